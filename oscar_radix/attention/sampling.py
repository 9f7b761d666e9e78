"""Which forwards are sampled for attention mass, and by how many queries."""

import numpy as np

from oscar_radix.attention.mass import MassSample, page_table
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.store import KVStore
from oscar_radix.sequence import Sequence

DECODE_INTERVAL = 64
"""Forwards from one sampled decode step to the next; counted over all forwards, so that every rank samples the same ones."""

PREFILL_QUERIES = 32
"""Last new queries of each sequence of a prefill, which are always sampled; fewer in a batch of several, see BATCH_QUERIES."""

QUERY_COUNTS = (PREFILL_QUERIES, 4, 1)
"""Queries of a sequence that are ever sampled: each number is a kernel to compile."""

BATCH_QUERIES = 64
"""Queries of a prefill batch, over all its sequences, beyond one of each: what they cost is to stay small beside the prefill."""

NEAREST = PAGE_TOKENS
"""Tokens right before a query that get nothing from it: every reader has them in its window, whatever becomes of their page."""


class MassSampling:
    """Adds the mass of a forward to the store's table, from `begin` when the forward is planned to `end` after its last layer.

    Between them the attention backend fills the sample that `begin` returns, layer by layer. `end` may come as late as before the next
    forward is planned: pages that are freed until then get nothing.

    Args:
        store: has a mass table; the device's tables of levels and hot blocks do not change between `begin` and `end`.

    Attributes:
        scale: what multiplies the scores; set by whoever runs the layers.
    """

    def __init__(self, store: KVStore):
        if store.mass is None:
            raise ValueError(f"policy {store.residency.policy.name} does not go by attention mass; there is no table to fill")
        self.store = store
        self.scale = 1.0
        self._sample: MassSample | None = None
        self._where: tuple[np.ndarray, np.ndarray] | None = None

    def every_decode_step(self) -> MassSample | None:
        """What decode steps of at most so many requests fill whether sampled or not, since CUDA graphs replay; None without room for it."""
        storage = self.store.mass.storage
        return MassSample(self.store, self.store.mass.table, storage.queries, storage=storage) if storage else None

    def wanted(self, decode: bool) -> bool:
        """Whether the forward that was planned last is sampled."""
        return not decode or self.store.residency.now % DECODE_INTERVAL == 0

    def begin(self, sequences: list[Sequence], padded: int = 0) -> MassSample | None:
        """Start with the sequences of a forward that is `wanted`, in batch order.

        Args:
            sequences: none: nothing need be kept, and nothing is.
            padded: rows of a decode step, sequences and padding; more than there is room for keep nothing.

        Returns:
            What the forward is to fill; of a prefill batch, perhaps not of all its sequences.
        """
        self._sample = None
        storage = self.store.mass.storage
        room = storage.queries if storage else len(sequences) * PREFILL_QUERIES
        if sequences and padded <= room:
            count = min(len(sequences), room)
            longest = max(sequence.seq_len - sequence.prefix_len for sequence in sequences)
            queries = _queries(longest, min(room, BATCH_QUERIES) // count)
            self._sample = MassSample(self.store, self.store.mass.table, count, queries, storage)
            self._where = page_table(sequences[:count])
        return self._sample

    def end(self) -> None:
        """Add what was kept. Nothing happens after a forward that was not sampled."""
        sample, self._sample = self._sample, None
        if sample is not None:
            sample.add(*self._where, self.scale, NEAREST)


def _queries(new_tokens: int, most: int) -> int:
    """The least of QUERY_COUNTS that takes all of so many new tokens, or else the largest, of those that are at most `most`; or 1."""
    possible = [count for count in QUERY_COUNTS if count <= most] or [1]
    return min((count for count in possible if count >= new_tokens), default=possible[0])
