"""Accounting by level, effective bits, adoption, and an integrity check that sees planted faults."""

import numpy as np
import pytest

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.base_records import BaseRecords
from oscar_radix.pool.hot_pool import PAGE_BLOCKS, HotPool
from oscar_radix.pool.integrity import check_integrity
from oscar_radix.pool.pages import Owner
from oscar_radix.pool.store import KVStore
from tests.attention.test_read import ChoosingPolicy
from tests.helpers import GEOMETRY, make_store, take_pages

LEVELS_OF_PAGES = {1: 0, 2: 2, 3: 4, 4: 8, 5: 32, 6: 32}
FRESH = 7


@pytest.fixture
def store() -> KVStore:
    """Ten pages: 1 to 6 sealed at several levels, the first three of them in the tree; 7 fresh; 8 to 10 free."""
    store = make_store(pages=10, hot_pages=8, refined=(0,))
    store.residency.policy = ChoosingPolicy()
    taken = take_pages(store, 7)
    for page in taken.tolist():
        store.hot.acquire(page)
    store.table.sealed[taken[:-1]] = True
    for page, level in LEVELS_OF_PAGES.items():
        if level < PAGE_TOKENS:
            store.residency.demote(page, level)
    store.enter_tree(taken[:3])
    return store


def check(store: KVStore, free: list[int] = (8, 9, 10), tree: list[int] = (1, 2, 3)) -> None:
    check_integrity(store, np.array(free, dtype=np.int64), np.array(tree, dtype=np.int64))


# Accounting ----------------------------------------------------------------------------------------------------------


def test_usage_by_level(store):
    record, block = BaseRecords.page_bytes(GEOMETRY, store.layout, store.refined), HotPool.block_bytes(GEOMETRY)
    usage = store.usage_by_level()
    assert usage == {
        "0": {"tokens": 32, "bytes": record},
        "2": {"tokens": 32, "bytes": record + block},
        "4": {"tokens": 32, "bytes": record + 2 * block},
        "8": {"tokens": 32, "bytes": record + 4 * block},
        "32": {"tokens": 64, "bytes": 2 * (record + 16 * block)},
        "fresh": {"tokens": 32, "bytes": record + 16 * block},
    }


def test_usage_sums_to_what_is_owned(store):
    usage = store.usage_by_level().values()
    used_blocks = store.hot.capacity - store.hot.free_blocks
    assert sum(entry["tokens"] for entry in usage) == 7 * PAGE_TOKENS
    record = BaseRecords.page_bytes(GEOMETRY, store.layout, store.refined)
    assert sum(entry["bytes"] for entry in usage) == 7 * record + used_blocks * HotPool.block_bytes(GEOMETRY)


def test_an_empty_store_uses_nothing():
    usage = make_store(pages=10).usage_by_level()
    assert all(entry == {"tokens": 0, "bytes": 0} for entry in usage.values())


def test_allocated_bytes_are_the_tensors(store):
    base, hot, table = store.base, store.hot, store.table
    columns = (table.owner, table.sealed, table.window, table.continuation, table.prefilling, table.last_use, table.position)
    assert store.allocated_bytes == {
        "codes": base.k_codes.nbytes + base.v_codes.nbytes + base.k_low.nbytes + base.v_low.nbytes,
        "scales": base.scales.nbytes,
        "hot_pool": hot.k_rows.nbytes + hot.v_rows.nbytes + hot.scales.nbytes + hot.row_numbers.nbytes,
        "tables": hot.block_table.nbytes + hot.levels.nbytes + hot.row_masks.nbytes + sum(column.nbytes for column in columns),
        "codec_parameters": store.codec.parameter_bytes,
    }


def test_the_mass_table_is_counted():
    store = make_store(pages=10, hot_pages=8, policy="attention")
    table, heat = store.mass.table, store.mass.heat
    tensors = (table.values, table.visits, table.given, table.slots, heat.values, heat.measured)
    assert store.allocated_bytes["mass"] == sum(tensor.nbytes for tensor in tensors)
    assert table.capacity == 8 * PAGE_BLOCKS // 4
    without = make_store(pages=10, hot_pages=8)
    assert "mass" not in without.allocated_bytes
    assert store.effective_bits > without.effective_bits


def test_effective_bits_count_every_allocated_byte(store):
    elements = 10 * PAGE_TOKENS * GEOMETRY.layers * GEOMETRY.kv_heads * GEOMETRY.head_dim * 2
    assert store.effective_bits == sum(store.allocated_bytes.values()) * 8 / elements
    assert store.effective_bits > store.layout.bits_per_element(GEOMETRY.head_dim)


# Adoption ------------------------------------------------------------------------------------------------------------


def test_the_trees_page_takes_the_rows_of_its_duplicate(store):
    store.table.last_use[5], store.table.window[5] = 42, True
    assert store.adopt_hot_rows(np.array([5]), np.array([1])) == 1
    assert store.hot.levels[[1, 5]].tolist() == [32, 0]
    assert store.table.last_use[1] == 42
    assert store.table.window[1]
    check(store)


@pytest.mark.parametrize("by_duplicate", [True, False])
def test_adopted_rows_belong_to_a_prompt_in_progress_when_either_page_did(store, by_duplicate):
    store.table.prefilling[5 if by_duplicate else 1] = True
    store.adopt_hot_rows(np.array([5]), np.array([1]))
    assert store.table.prefilling[1]


def test_rows_that_the_tree_has_itself_are_not_taken(store):
    store.enter_tree(np.array([6]))
    assert store.adopt_hot_rows(np.array([5]), np.array([6])) == 0
    assert store.hot.levels[[5, 6]].tolist() == [32, 32]


def test_whole_pages_replace_single_rows(store):
    free = store.hot.free_blocks
    assert store.adopt_hot_rows(np.array([5]), np.array([3])) == 1
    assert store.hot.levels[[3, 5]].tolist() == [32, 0]
    assert store.hot.free_blocks == free + 2, "the 4 rows that the tree's page had are free again"
    check(store)


@pytest.mark.parametrize("duplicate", [4, FRESH])
def test_only_whole_sealed_pages_are_adopted(store, duplicate):
    assert store.adopt_hot_rows(np.array([duplicate]), np.array([1])) == 0


def test_continuation_points_are_hot_pages(store):
    store.residency.now = 9
    store.set_continuation_points(np.array([4, 5, 6]), [3], 3)
    assert np.flatnonzero(store.table.continuation).tolist() == [5, 6]
    assert store.table.last_use[[4, 5, 6]].tolist() == [0, 9, 9]


def test_other_places_of_a_sequence_are_no_continuation_points_any_more(store):
    store.table.continuation[[4, 5, 6]] = True
    store.set_continuation_points(np.array([5, 6, 4]), [2], 1)
    assert np.flatnonzero(store.table.continuation).tolist() == [6]


def test_a_wanted_continuation_is_kept_until_it_is_hot(store):
    store.want_continuation(np.array([4]))
    store.set_continuation_points(np.array([4, 5]), [1, 2], 1)
    assert np.flatnonzero(store.table.continuation).tolist() == [4, 5]


# Integrity -----------------------------------------------------------------------------------------------------------


def test_integrity_holds(store):
    check(store)


def test_integrity_after_clear(store):
    store.clear()
    check(store, free=list(range(1, 11)), tree=[])


@pytest.mark.parametrize(
    ("free", "tree", "message"),
    [
        ([8, 9], [1, 2, 3], "the free list holds 2 pages, the page table says 3; first odd one: page 10"),
        ([8, 9, 10, 10], [1, 2, 3], "the free list names 4 pages, of which 3 are distinct"),
        ([8, 9, 10], [1, 2], "the tree holds 2 pages, the page table says 3; first odd one: page 3"),
        ([8, 9, 10], [1, 2, 3, 4], "the tree holds 4 pages, the page table says 3; first odd one: page 4"),
        ([8, 9, 10], [1, 2, 3, 3], "the tree names 4 pages, of which 3 are distinct"),
    ],
)
def test_integrity_sees_lists_that_disagree(store, free, tree, message):
    with pytest.raises(RuntimeError, match=message):
        check(store, free, tree)


def test_integrity_sees_hot_rows_of_free_pages(store):
    store.hot.acquire(9)
    with pytest.raises(RuntimeError, match="1 free pages hold hot rows"):
        check(store)


def test_integrity_sees_an_unsealed_page_in_the_tree(store):
    store.table.sealed[2] = False
    with pytest.raises(RuntimeError, match="1 pages of the tree are not sealed"):
        check(store)


def test_integrity_sees_a_fresh_page_that_lost_rows(store):
    store.table.sealed[4] = False
    with pytest.raises(RuntimeError, match="a fresh page holds part of its int8 rows"):
        check(store)


def test_integrity_sees_a_lost_hot_block(store):
    store.hot.free.take(1)
    with pytest.raises(RuntimeError, match="hot blocks have"):
        check(store)


def test_integrity_sees_a_page_that_changed_hands_behind_the_stores_back(store):
    store.table.owner[1] = Owner.REQUEST
    with pytest.raises(RuntimeError, match="the tree holds 3 pages, the page table says 2; first odd one: page 1"):
        check(store)


def test_a_fresh_page_takes_a_whole_pages_blocks(store):
    assert (store.hot.block_table[FRESH] >= 0).sum() == PAGE_BLOCKS
