"""The digest that tensor-parallel ranks compare: equal after the same operations, different after any other."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.pool.digest import host_state_digest
from oscar_radix.pool.store import KVStore
from tests.helpers import make_store, take_pages

PAGES = 6


def store_after(levels: list[int]) -> KVStore:
    """Sealed pages 1 to PAGES, each at one of the levels 0 and 32."""
    store = make_store(pages=PAGES + 2, hot_pages=PAGES)
    for page, level in zip(take_pages(store, PAGES).tolist(), levels, strict=True):
        store.table.sealed[page] = True
        if level:
            store.hot.acquire(page)
    return store


@settings(max_examples=20, deadline=None)
@given(*[st.lists(st.sampled_from([0, 32]), min_size=PAGES, max_size=PAGES)] * 2)
def test_ranks_agree_exactly_when_their_pages_do(here, there):
    assert (host_state_digest(store_after(here)) == host_state_digest(store_after(there))) == (here == there)


def test_a_page_that_only_one_rank_gave_to_the_tree_shows():
    stores = [store_after([32] * PAGES) for _ in range(2)]
    stores[1].enter_tree(np.array([2]))
    assert host_state_digest(stores[0]) != host_state_digest(stores[1])


def test_a_forward_that_only_one_rank_counted_shows():
    stores = [store_after([0] * PAGES) for _ in range(2)]
    stores[1].residency.now += 1
    assert host_state_digest(stores[0]) != host_state_digest(stores[1])
