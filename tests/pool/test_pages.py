"""Owners of pages change only from whom they may, and the error names who has them."""

import numpy as np
import pytest

from oscar_radix.pool.pages import Owner, PageTable
from tests.helpers import make_store, take_pages


def pages(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_the_life_of_a_page():
    table = PageTable(6)
    table.transfer(pages(1, 2), (Owner.FREE,), Owner.REQUEST)
    table.transfer(pages(2), (Owner.REQUEST,), Owner.TREE)
    table.transfer(pages(2, 1), (Owner.REQUEST, Owner.TREE), Owner.FREE)
    assert not table.owner.any()


def test_nothing_to_transfer():
    PageTable(6).transfer(pages(), (Owner.FREE,), Owner.REQUEST)


@pytest.mark.parametrize(
    ("moved", "allowed", "message"),
    [
        (pages(3), (Owner.FREE,), r"1 pages cannot become TREE: page 3 is owned by REQUEST, not by \['FREE'\]"),
        (pages(1, 2), (Owner.REQUEST, Owner.TREE), r"2 pages cannot become TREE: page 1 is owned by FREE, not by \['REQUEST', 'TREE'\]"),
        (pages(1, 1, 2), (Owner.FREE,), "3 pages are to become TREE, but only 2 are distinct"),
        (pages(0, 1), (Owner.FREE,), r"pages 0\.\.1 are not all within 1\.\.5"),
        (pages(6), (Owner.FREE,), r"pages 6\.\.6 are not all within 1\.\.5"),
    ],
)
def test_wrong_transfer(moved, allowed, message):
    table = PageTable(6)
    table.transfer(pages(3), (Owner.FREE,), Owner.REQUEST)
    before = table.owner.copy()
    with pytest.raises(RuntimeError, match=message):
        table.transfer(moved, allowed, Owner.TREE)
    assert np.array_equal(table.owner, before), "nothing changed"


def test_forget_resets_everything_but_the_owner():
    table = PageTable(6)
    for column in (table.sealed, table.window, table.continuation, table.prefilling):
        column.fill(True)
    table.owner.fill(Owner.TREE)
    table.forget(pages(2, 4))
    for column in (table.sealed, table.window, table.continuation, table.prefilling):
        assert np.flatnonzero(~column).tolist() == [2, 4]
    assert (table.owner == Owner.TREE).all()


# Through the store ---------------------------------------------------------------------------------------------------


def test_double_free():
    store = make_store(pages=8)
    taken = take_pages(store, 2)
    store.free(taken)
    with pytest.raises(RuntimeError, match="2 pages cannot become FREE: page 1 is owned by FREE"):
        store.free(taken)


def test_allocating_a_page_twice():
    store = make_store(pages=8)
    taken = take_pages(store, 1)
    with pytest.raises(RuntimeError, match=r"page 1 is owned by REQUEST, not by \['FREE'\]"):
        store.allocate(taken)


def test_a_partial_page_never_enters_the_tree():
    store = make_store(pages=8)
    taken = take_pages(store, 2)
    store.table.sealed[taken[:1]] = True
    with pytest.raises(RuntimeError, match="1 of 2 pages that enter the tree are not sealed; first: 2"):
        store.enter_tree(taken)
    assert (store.table.owner[taken] == Owner.REQUEST).all()


def test_freeing_drops_hot_rows():
    store = make_store(pages=8, hot_pages=2)
    taken = take_pages(store, 2)
    store.hot.acquire(int(taken[0]))
    store.free(taken)
    assert store.hot.free_blocks == store.hot.capacity


def test_a_page_comes_back_from_the_free_list_as_new():
    store = make_store(pages=1)
    page = take_pages(store, 1)
    for column in (store.table.sealed, store.table.window, store.table.continuation, store.table.prefilling):
        column[page] = True
    store.free(page)
    store.allocate(page)
    for column in (store.table.sealed, store.table.window, store.table.continuation, store.table.prefilling):
        assert not column[page].any()
