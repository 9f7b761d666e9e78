"""Plan of one forward: which rows go where, which pages are sealed, what each sequence reads at which level."""

from dataclasses import dataclass

import numpy as np
import torch

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.hot_pool import BLOCK_ROWS, PAGE_BLOCKS
from oscar_radix.pool.request_pages import DecodeStep
from oscar_radix.pool.store import KVStore
from oscar_radix.pool.upload import upload, upload_all
from oscar_radix.sequence import Sequence


@dataclass(frozen=True)
class WritePlan:
    """Where the forward's T new tokens go. All tensors int64 on the store's device.

    tokens, blocks, places [H]: tokens (indices into the batch) whose int8 rows enter the hot pool, and their places.
    seal_pages [M], seal_blocks [M, 16]: pages that become full and hold all their rows in the hot pool.
    direct_pages [N], direct_tokens [N, 32]: pages that begin and end in this forward and found no hot blocks.
    """

    tokens: torch.Tensor
    blocks: torch.Tensor
    places: torch.Tensor
    seal_pages: torch.Tensor
    seal_blocks: torch.Tensor
    direct_pages: torch.Tensor
    direct_tokens: torch.Tensor


@dataclass(frozen=True)
class ReadPlan:
    """What one sequence reads. Its queries are tokens [start, end) of the batch.

    base_pages int64 [N]: sealed pages below level 32, read from their 2-bit records.
    partial: for each level between 0 and 32, (index int64 [P] into base_pages, blocks int64 [P, level / 2]).
    whole_blocks int64 [M, 16], whole_rows: pages read at int8, and the number of valid tokens in them.
    own_chunk: the queries attend to their own chunk causally (extend), not through the cache.
    """

    start: int
    end: int
    base_pages: torch.Tensor
    partial: list[tuple[torch.Tensor, torch.Tensor]]
    whole_blocks: torch.Tensor
    whole_rows: int
    own_chunk: bool


@dataclass(frozen=True)
class ForwardPlan:
    """Everything that `run` needs in every layer."""

    write: WritePlan
    reads: list[ReadPlan]


def plan_forward(store: KVStore, sequences: list[Sequence]) -> ForwardPlan:
    """Prepare the store for a forward and lay out its reads and writes.

    Args:
        store: the KV store; its hot pool is brought to this forward's state.
        sequences: in batch order; new tokens of sequence i follow those of sequence i - 1.
    """
    store.residency.prepare(sequences)
    return _plan(store, sequences)


def plan_decode(store: KVStore, step: DecodeStep) -> ForwardPlan:
    """`plan_forward` for a decode step."""
    store.residency.prepare_decode(step)
    return _plan(store, step.sequences())


def plan_writes(store: KVStore, sequences: list[Sequence]) -> tuple[np.ndarray, ...]:
    """Prepare the store for a forward and lay out its writes alone: the fields of a WritePlan, in order, on the host.

    Nothing is copied to the device here, so that the caller can send them along with what else it has.
    """
    store.residency.prepare(sequences)
    return _write_arrays(store, sequences)


def _plan(store: KVStore, sequences: list[Sequence]) -> ForwardPlan:
    starts = _starts(sequences)
    reads = [_plan_read(store, sequence, int(start)) for sequence, start in zip(sequences, starts, strict=False)]
    return ForwardPlan(WritePlan(*upload_all(_write_arrays(store, sequences), store.device)), reads)


def _starts(sequences: list[Sequence]) -> np.ndarray:
    return np.cumsum([0] + [sequence.seq_len - sequence.prefix_len for sequence in sequences])


def _write_arrays(store: KVStore, sequences: list[Sequence]) -> tuple[np.ndarray, ...]:
    starts = _starts(sequences)
    positions = [np.arange(sequence.prefix_len, sequence.seq_len) for sequence in sequences]
    page = np.concatenate([sequence.pages[at // PAGE_TOKENS] for sequence, at in zip(sequences, positions, strict=True)])
    offset = np.concatenate(positions) % PAGE_TOKENS
    tokens = np.flatnonzero(store.hot.levels[page])
    blocks = store.hot.block_table[page[tokens], offset[tokens] // BLOCK_ROWS]
    completed = np.concatenate([sequence.completed for sequence in sequences])
    whole = store.is_whole(completed)
    # The batch index of a completed page's first token; only pages that begin in this forward can lack hot blocks.
    first = np.concatenate(
        [
            start + np.arange(len(sequence.completed)) * PAGE_TOKENS - sequence.prefix_len % PAGE_TOKENS
            for sequence, start in zip(sequences, starts, strict=False)
        ]
    )
    return (
        tokens,
        blocks.astype(np.int64),
        offset[tokens] % BLOCK_ROWS,
        completed[whole],
        store.hot.block_numbers(completed[whole], PAGE_TOKENS),
        completed[~whole],
        first[~whole][:, None] + np.arange(PAGE_TOKENS),
    )


def _plan_read(store: KVStore, sequence: Sequence, start: int) -> ReadPlan:
    end = start + sequence.seq_len - sequence.prefix_len
    pages = sequence.pages[: -(-sequence.readable // PAGE_TOKENS)]
    levels = store.hot.levels[pages]
    whole = levels == PAGE_TOKENS
    if sequence.readable % PAGE_TOKENS and not whole[-1]:
        raise RuntimeError(f"page {pages[-1]} is partial but its rows are not in the hot pool")
    base = pages[~whole]
    base_levels = levels[~whole]
    partial = []
    for level in np.unique(base_levels[base_levels > 0]).tolist():
        index = np.flatnonzero(base_levels == level)
        partial.append((upload(index, store.device), store.hot.blocks_of(base[index], level)))
    unwritten = -sequence.readable % PAGE_TOKENS
    return ReadPlan(
        start=start,
        end=end,
        base_pages=upload(base, store.device),
        partial=partial,
        whole_blocks=store.hot.blocks_of(pages[whole], PAGE_TOKENS).view(-1, PAGE_BLOCKS),
        whole_rows=int(whole.sum()) * PAGE_TOKENS - unwritten,
        own_chunk=not sequence.decode,
    )
