"""Which forwards are sampled for attention mass, and by how many queries."""

from oscar_radix.attention.mass import MassSample, page_table
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.store import KVStore
from oscar_radix.sequence import Sequence

DECODE_INTERVAL = 32
"""Forwards from one sampled decode step to the next; counted over all forwards, so that every rank samples the same ones."""

PREFILL_QUERIES = 32
"""Last new queries of each sequence of a prefill, which are always sampled."""

NEAREST = PAGE_TOKENS
"""Tokens right before a query that get nothing from it: every reader has them in its window, whatever becomes of their page."""


class MassSampling:
    """Adds the mass of a forward to the store's table, from `begin` after the forward is planned to `end` after its last layer.

    Between them the attention backend fills the sample that `begin` returns, layer by layer.

    Args:
        store: has a mass table; its pages' levels do not change between `begin` and `end`.
    """

    def __init__(self, store: KVStore):
        if store.mass is None:
            raise ValueError(f"policy {store.residency.policy.name} does not go by attention mass; there is no table to fill")
        self.store = store
        self._sample: MassSample | None = None
        self._sequences: list[Sequence] = []

    def wanted(self, decode: bool) -> bool:
        """Whether the forward that was planned last is sampled."""
        return not decode or self.store.residency.now % DECODE_INTERVAL == 0

    def begin(self, sequences: list[Sequence]) -> MassSample | None:
        """Start with the sequences of a forward that is `wanted`, in batch order. Without any: None, and nothing need be kept."""
        self._sample, self._sequences = None, sequences
        if sequences:
            longest = max(sequence.seq_len - sequence.prefix_len for sequence in sequences)
            self._sample = MassSample(self.store, self.store.mass.table, len(sequences), min(PREFILL_QUERIES, longest))
        return self._sample

    def end(self, scale: float) -> None:
        """Add what was kept; `scale` is what multiplied the scores. Nothing happens after a forward that was not sampled."""
        sample, self._sample = self._sample, None
        if sample is not None:
            sample.add(*page_table(self._sequences, self.store.device), scale, NEAREST)
