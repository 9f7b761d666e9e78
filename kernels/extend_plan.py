"""How a prefill batch is cut up for the extend kernels: blocks of queries, parts of the keys, rounds over prefixes that are opened first.

A cached token is opened from its record either by every program that attends to it (direct: nothing is written, but the work repeats
for each block of queries) or once, to fp16 rows in a scratch of constant size (dense: worth it from DENSE_TOKENS new tokens on).
Longer prefixes go through the scratch in rounds.
"""

from dataclasses import dataclass

import torch
import triton

ROWS = 128
"""Query rows of a program."""
ROUND_TILE = 128
"""Tokens that are opened, and attended to, together."""

LARGEST_SPLIT = 16
MIN_PART_TILES = 4

DENSE_TOKENS = 96
"""New tokens a cached token, on average, from which opening it once is faster. On an H100 opening a token of 8 heads costs 2.4 ns, and a
new token's attention to it 27 ps, against 49 ps where every program opens it: equal at 108; with 2 hot rows a page at 66."""
SCRATCH_BYTES = 128 * 2**20
"""2,048 new tokens on 102,400 take 5.03 ms in rounds of 64 MiB, 4.94 ms of 128 MiB, 4.88 ms of 256 MiB."""


def block_tokens(group: int) -> int:
    """Query tokens of a program, for `group` query heads a KV head (at most 128)."""
    return ROWS // triton.next_power_of_2(group)


def query_blocks(lengths: list[int], group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and first position of each block of query tokens, for `group` query heads a KV head: int32 [N] each."""
    pairs = [(request, first) for request, length in enumerate(lengths) for first in range(0, length, block_tokens(group))]
    request, first = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
    return request, first


def extend_splits(prefixes: list[int], lengths: list[int], kv_heads: int, group: int, multiprocessors: int) -> int:
    """Parts of the keys that make the programs of a prefill batch (one a multiprocessor at a time) fill the GPU best.

    With n programs and s parts the time is ceil(n s / multiprocessors) / s waves; the fewest parts within 5 % of the least time,
    each of at least MIN_PART_TILES tiles of the longest sequence.

    Args:
        prefixes, lengths: cached and new tokens of each sequence.
    """
    programs = kv_heads * sum(-(-length // block_tokens(group)) for length in lengths)
    tiles = max(-(-(prefix + length) // ROUND_TILE) for prefix, length in zip(prefixes, lengths, strict=True))
    most = max(1, min(LARGEST_SPLIT, tiles // MIN_PART_TILES))
    waves = {s: -(-programs * s // multiprocessors) / s for s in range(1, most + 1)}
    return next(s for s, time in waves.items() if time <= 1.05 * min(waves.values()))


def is_dense(prefixes: list[int], lengths: list[int]) -> bool:
    """Whether opening the prefixes once is faster than opening them in every program."""
    work = sum(prefix * length for prefix, length in zip(prefixes, lengths, strict=True))
    return work >= DENSE_TOKENS * sum(prefixes)


@dataclass(frozen=True)
class ExtendRounds:
    """Rounds over the prefixes of a prefill batch.

    segments int32 [rounds, B, 4]: of each sequence the cached tokens [first, end) that a round attends to, the scratch row of the first
    of them, and 1 in the round that also attends to the chunk itself, the sequence's last. tiles: for each round what is opened into the
    scratch, row by row, int32 [N, 2]: sequence and first token of ROUND_TILE tokens. scratch_rows: rows of the largest round.
    """

    segments: torch.Tensor
    tiles: tuple[torch.Tensor, ...]
    scratch_rows: int


@dataclass(frozen=True)
class ExtendPlan:
    """What the extend kernels take besides the batch: blocks of queries, the number of parts of the keys, and rounds if it is dense."""

    blocks: tuple[torch.Tensor, torch.Tensor]
    splits: int
    rounds: ExtendRounds | None

    def tensors(self) -> list[torch.Tensor]:
        """All of them, in the order in which `on` takes them."""
        return [*self.blocks, *((self.rounds.segments, *self.rounds.tiles) if self.rounds else ())]

    def on(self, tensors: list[torch.Tensor]) -> "ExtendPlan":
        """The plan with copies of its tensors, on a device."""
        request, first, *rest = tensors
        rounds = ExtendRounds(rest[0], tuple(rest[1:]), self.rounds.scratch_rows) if self.rounds else None
        return ExtendPlan((request, first), self.splits, rounds)


def extend_rounds(prefixes: list[int], scratch_rows: int) -> ExtendRounds:
    """Rounds that each open at most `scratch_rows` rows (a multiple of ROUND_TILE), on the host.

    Args:
        prefixes: cached tokens of each sequence.
    """
    rounds: list[list[list[int]]] = []
    tiles: list[list[tuple[int, int]]] = []

    def begin() -> None:
        rounds.append([[0, 0, 0, 0] for _ in prefixes])
        tiles.append([])

    begin()
    for sequence, prefix in enumerate(prefixes):
        done = 0
        while True:
            used = len(tiles[-1]) * ROUND_TILE
            end = min(prefix, done + scratch_rows - used)
            if end > done or done == prefix:
                rounds[-1][sequence] = [done, end, used, int(end == prefix)]
                tiles[-1] += [(sequence, token) for token in range(done, end, ROUND_TILE)]
                done = end
            if done == prefix:
                break
            begin()
    opened = tuple(torch.tensor(each, dtype=torch.int32).view(-1, 2) for each in tiles)
    return ExtendRounds(torch.tensor(rounds, dtype=torch.int32), opened, ROUND_TILE * max(map(len, tiles)))


def plan_extend(
    prefixes: list[int], lengths: list[int], kv_heads: int, group: int, head_dim: int, multiprocessors: int, dense_exists: bool
) -> ExtendPlan:
    """The plan of a prefill batch, on the host.

    Args:
        prefixes, lengths: cached and new tokens of each sequence.
        dense_exists: whether the device has the kernel that attends to opened rows.
    """
    blocks = query_blocks(lengths, group)
    if dense_exists and is_dense(prefixes, lengths):
        rows = SCRATCH_BYTES // (4 * kv_heads * head_dim) // ROUND_TILE * ROUND_TILE
        at_once = [min(prefix, rows) for prefix in prefixes]
        splits = extend_splits(at_once, lengths, kv_heads, group, multiprocessors)
        return ExtendPlan(blocks, splits, extend_rounds(prefixes, rows))
    return ExtendPlan(blocks, extend_splits(prefixes, lengths, kv_heads, group, multiprocessors), None)
