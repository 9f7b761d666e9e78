"""A fingerprint of what the host decides about a store; tensor-parallel ranks must have the same."""

import zlib

from oscar_radix.pool.store import KVStore


def host_state_digest(store: KVStore) -> int:
    """32-bit checksum of owners, states and levels of all pages, hot blocks, mass slots and the mass that decisions go by."""
    table, hot = store.table, store.hot
    arrays = [table.owner, table.sealed, table.window, table.continuation, table.prefilling, hot.levels, hot.block_table]
    if store.mass:
        arrays += [store.mass.table.slots, store.mass.heat.values]
    if store.copies:
        arrays.append(store.copies.host.slots)
    digest = store.residency.now
    for array in arrays:
        digest = zlib.crc32(array.tobytes(), digest)
    return digest
