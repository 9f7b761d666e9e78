"""Every page, block, mass slot and host slot has exactly one owner, and the bytes add up."""

import numpy as np

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.base_records import BaseRecords
from oscar_radix.pool.hot_pool import PAGE_BLOCKS, HotPool
from oscar_radix.pool.pages import Owner
from oscar_radix.pool.store import KVStore


def check_integrity(store: KVStore, free_pages: np.ndarray, tree_pages: np.ndarray) -> None:
    """Recount owners and bytes.

    Args:
        store: pages, records, hot pool and what follows them.
        free_pages: int64, the allocator's free list.
        tree_pages: int64, pages of all radix nodes.

    Raises:
        RuntimeError: naming the first page, block or mass slot that has not exactly one owner, or a byte count that is off.
    """
    table, hot = store.table, store.hot
    hot.check_integrity()
    for name, listed, owner in (("free list", free_pages, Owner.FREE), ("tree", tree_pages, Owner.TREE)):
        ours = np.flatnonzero(table.owner[1:] == owner) + 1
        if len(np.unique(listed)) != len(listed):
            raise RuntimeError(f"the {name} names {len(listed)} pages, of which {len(np.unique(listed))} are distinct")
        if not np.array_equal(np.sort(listed), ours):
            odd = np.setxor1d(listed, ours)
            raise RuntimeError(f"the {name} holds {len(listed)} pages, the page table says {len(ours)}; first odd one: page {odd[0]}")
    free = table.owner == Owner.FREE
    if (hot.levels[free] > 0).any():
        raise RuntimeError(f"{int((hot.levels[free] > 0).sum())} free pages hold hot rows")
    if store.copies:
        store.copies.host.check_integrity()
        if (copied := store.copies.host.slots[free] >= 0).any():
            raise RuntimeError(f"{int(copied.sum())} free pages have copies in host memory")
    tree = table.owner == Owner.TREE
    if not table.sealed[tree].all():
        raise RuntimeError(f"{int((~table.sealed[tree]).sum())} pages of the tree are not sealed")
    fresh = (table.owner == Owner.REQUEST) & ~table.sealed
    if (hot.levels[fresh] % PAGE_TOKENS).any():
        raise RuntimeError("a fresh page holds part of its int8 rows")
    if store.mass:
        store.mass.check_integrity(store.can_be_whole(np.arange(table.count)) | (hot.levels > 0))
    used = sum(entry["bytes"] for entry in store.usage_by_level().values())
    owned = int((table.owner != Owner.FREE).sum())
    blocks = hot.capacity - hot.free_blocks
    unwritten = int((hot.levels[fresh] == 0).sum()) * PAGE_BLOCKS
    record = BaseRecords.page_bytes(store.geometry, store.layout, store.refined)
    expected = owned * record + (blocks + unwritten) * HotPool.block_bytes(store.geometry)
    if used != expected:
        raise RuntimeError(f"bytes by level add up to {used}, the pools hold {expected}")
