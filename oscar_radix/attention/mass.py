"""Sampled forwards: the queries that are kept while the layers run, and the mass that they add when the forward is done."""

import numpy as np
import torch

from oscar_radix.attention.watched import watched_pages
from oscar_radix.codec.int8_rows import dequantise_rows
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.kernels.attention_mass import attention_mass
from oscar_radix.pool.mass import MassTable
from oscar_radix.pool.sample_storage import SampleStorage
from oscar_radix.pool.store import KVStore
from oscar_radix.pool.upload import upload_all
from oscar_radix.sequence import Sequence


class MassSample:
    """The last queries of each sequence of one forward, in the key basis, with the log-sum-exp of their attention.

    A backend fills `query` and `lse` (or calls `keep`) layer by layer, then `add` runs once. A forward that is not sampled has no
    MassSample to fill, and costs nothing.

    Attributes:
        query: float32 [layers, requests, queries, Hq, D]; query t of a sequence of n tokens stands at position n - queries + t.
        lse: float32 [layers, requests, queries, Hq], natural logarithm, over all that the query attended to; inf: does not count.

    Args:
        store: the KV store whose pages are read.
        table: where the mass goes.
        requests: sequences of a forward that are kept; those after them are not sampled.
        queries: queries of each sequence; 1 for decode.
        storage: where queries and log-sum-exp are kept, of which requests * queries are taken and not cleared; None for memory of its own.
    """

    def __init__(self, store: KVStore, table: MassTable, requests: int, queries: int = 1, storage: SampleStorage | None = None):
        self.store, self.table = store, table
        storage = storage or SampleStorage.empty(store.geometry, requests * queries, store.device)
        if requests * queries > storage.queries:
            raise ValueError(f"{requests} requests of {queries} queries are more than the {storage.queries} that there is room for")
        self.query = storage.query[:, : requests * queries].unflatten(1, (requests, queries))
        self.lse = storage.lse[:, : requests * queries].unflatten(1, (requests, queries))

    def keep(self, layer: int, request: int, query: torch.Tensor, lse: torch.Tensor) -> None:
        """Keep the last of a sequence's new queries [n, Hq, D] and their log-sum-exp [n, Hq]; fewer than asked for: all of them."""
        if request < self.query.shape[1]:
            wanted = self.query.shape[2]
            count = min(wanted, len(query))
            self.lse[layer, request, : wanted - count] = float("inf")
            self.query[layer, request, wanted - count :] = query[-count:]
            self.lse[layer, request, wanted - count :] = lse[-count:]

    def keep_rows(self, layer: int, query: torch.Tensor, lse: torch.Tensor, rows: torch.Tensor, factor: float = 1.0) -> None:
        """`keep` for a whole batch without the host: query [N, Hq, D] and lse [N, Hq] of all new tokens, on any device.

        Args:
            rows: int64 [B, queries] of `last_rows`, on the device; B at most `requests`.
            factor: multiplies the queries.
        """
        index, missing = rows.clamp(min=0), rows[..., None] < 0
        self.query[layer, : len(rows)] = query[index].float().masked_fill(missing[..., None], 0.0) * factor
        self.lse[layer, : len(rows)] = lse[index].masked_fill(missing, float("inf"))

    def rows(self, lengths: list[int]) -> np.ndarray:
        """What `keep_rows` takes, of a prefill batch of `lengths` new tokens: int64 [requests or fewer, queries], on the host."""
        return last_rows(lengths[: self.query.shape[1]], self.query.shape[2])

    def add(self, pages: np.ndarray, lengths: np.ndarray, scale: float, nearest: int = 0) -> None:
        """Add the mass of the forward's first B sequences to the pages that hold a slot now.

        Args:
            pages: int32 [B, C], page numbers in order, anything beyond the sequence's end; B at most `requests`, more are not sampled.
            lengths: int64 [B], tokens after the forward.
            scale: what multiplied the scores.
            nearest: a query gives nothing to its own token and the `nearest - 1` before it.
        """
        batch = min(len(lengths), self.query.shape[1])
        run = self.add_reference if self.store.device.type == "cpu" else self.add_by_kernel
        run(pages[:batch], lengths[:batch], scale, nearest)

    def add_reference(self, pages: np.ndarray, lengths: np.ndarray, scale: float, nearest: int = 0) -> None:
        """`add` in plain torch on any device: the specification of the kernel. Synchronises with the host."""
        for request, length in enumerate(lengths.tolist()):
            self._add_one(request, pages[request], length, scale, nearest)

    def _add_one(self, request: int, pages: np.ndarray, length: int, scale: float, nearest: int) -> None:
        """One sequence, layer by layer, only pages that hold a slot."""
        table, queries = self.table, self.query.shape[2]
        listed = pages[: -(-length // PAGE_TOKENS)]
        index = np.flatnonzero((table.slots[listed] >= 0) & (listed > 0))
        if not len(index):
            return
        device = self.store.device
        slots = torch.from_numpy(table.slots[listed[index]].astype(np.int64)).to(device)
        position = torch.from_numpy(index[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).to(device).flatten()
        limits = length - queries + 1 + torch.arange(queries, device=device) - nearest
        # Keys of `attention_mass` are counted from 0, those here have gaps: a query sees the first `seen` of them.
        seen = (position < limits[:, None]).sum(dim=1)
        for layer in range(self.store.geometry.layers):
            key = page_keys(self.store, layer, listed[index]).transpose(0, 1).flatten(1, 2)
            mass = attention_mass(self.query[layer, request], self.lse[layer, request], key, seen, scale)
            table.values[layer, slots] += mass.view(-1, len(index), PAGE_TOKENS).transpose(0, 1)
        counted = self.lse[0, request, :, 0].isfinite()[:, None] & (torch.arange(len(position), device=device) < seen[:, None])
        table.visits[slots] += counted.sum(dim=0).view(-1, PAGE_TOKENS)

    def add_by_kernel(self, pages: np.ndarray, lengths: np.ndarray, scale: float, nearest: int = 0) -> None:
        """`add` on a GPU."""
        from oscar_radix.kernels.mass import add_mass  # Triton is needed on GPUs only

        store, table, hot, codec, batch = self.store, self.table, self.store.hot, self.store.codec, len(lengths)
        watched = watched_pages(table.slots, pages, lengths)
        if not watched.chunks.size:
            return
        low = (store.base.k_low, codec.low_places) if codec.refined else None
        cache = (store.base.k_codes, store.base.scales, hot.k_rows, hot.scales, hot.row_masks, hot.row_numbers)
        add_mass(
            self.query[:, :batch],
            self.lse[:, :batch],
            cache,
            (hot.device_block_table, hot.device_levels),
            (codec.key_step, codec.key_zero, codec.key_masks),
            tuple(upload_all([lengths, watched.entries, watched.chunks], store.device)),
            (table.values, table.visits),
            scale,
            nearest,
            low,
        )


def last_rows(lengths: list[int], queries: int) -> np.ndarray:
    """Which of a prefill batch's tokens are the last `queries` of each sequence of `lengths` new tokens: int64 [B, queries], -1: none."""
    ends = np.cumsum(lengths)[:, None]
    rows = ends - queries + np.arange(queries)
    return np.where(rows < ends - np.array(lengths)[:, None], -1, rows)


def page_keys(store: KVStore, layer: int, pages: np.ndarray) -> torch.Tensor:
    """Keys of pages (int64 [N]) in the basis, each token as attention reads it, hot row or record: float32 [N, Hkv, 32, D]."""
    key, _ = store.codec.open(layer, *store.records(layer, torch.from_numpy(pages).to(store.device)))
    levels = store.hot.levels[pages]
    for level in np.unique(levels[levels > 0]).tolist():
        index = torch.from_numpy(np.flatnonzero(levels == level)).to(store.device)
        blocks = store.hot.blocks_of(pages[levels == level], level)
        rows = store.hot.read(layer, blocks)
        if level == PAGE_TOKENS:
            key[index] = dequantise_rows(rows.k, rows.k_scale)
            continue
        numbers = store.hot.row_numbers[layer, blocks].long()  # [P, level / 2, Hkv, 2]
        token = numbers.transpose(1, 2).reshape(*rows.k.shape[:3])
        key[index] = key[index].scatter(2, token[..., None].expand_as(rows.k), dequantise_rows(rows.k, rows.k_scale))
    return key


def page_table(sequences: list[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """What `MassSample.add` takes, of a forward's sequences: pages int32 [B, C] and tokens after the forward int64 [B]."""
    pages = np.zeros((len(sequences), max(len(sequence.pages) for sequence in sequences)), dtype=np.int32)
    for row, sequence in zip(pages, sequences, strict=True):
        row[: len(sequence.pages)] = sequence.pages
    return pages, np.array([sequence.seq_len for sequence in sequences], dtype=np.int64)
