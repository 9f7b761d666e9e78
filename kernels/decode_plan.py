"""The plan of a decode step, made on the device once and used by every layer: its pages, those with hot rows, and who reads what.

A part is a one-warp program of stage 1 for each KV head and pass of query heads; there are as many as the GPU holds at once. A sequence
gets parts in proportion to the bytes that it reads: the least cost c for which the sum of ceil(cost / c) fits. The host knows neither
lengths nor levels, so a CUDA graph replays. Layers read the plan's pages, not req_to_token: a server may give that a new page of the same
tokens, which this step's levels and blocks do not know, as soon as the step is planned.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.decode_hot import TILE_BLOCKS
from oscar_radix.kernels.pages import PAGE

HOT_LEVELS = tl.constexpr((32, 8, 4, 2))
"""Levels in the order of the list of hot pages."""

HOT_TILE_COST = tl.constexpr(3)
"""A tile of 32 int8 rows beside a page's record: four times the bytes, but fewer instructions. Measured on an H100, 2 hot rows a page:
3 is 2 to 4 % faster than 4, and than 2 where sequences are long."""

PROGRAM_TILES = tl.constexpr(3)
"""Pages that a program reads at least, before another one helps."""

PASS_HEADS = tl.constexpr(8)
"""Query heads of a program."""

MULTIPROCESSOR_PROGRAMS = 16
"""One-warp programs of 128 registers that a multiprocessor holds."""

LARGEST_PARTS = 1024
"""More parts do not help: a part then reads PROGRAM_TILES pages of a sequence of 98,304 tokens."""


@dataclass(frozen=True)
class DecodePlan:
    """Addresses of a step's plan.

    pages int32 [B, C]: page numbers of each sequence; hot int32 [B, N]: indices of those that hold hot rows, of levels 32, 8, 4, 2 one
    after the other; counts int32 [B, 4]: their numbers; starts int32 [B + 1]: the first part of each sequence; requests int32 [P]: the
    sequence of each part, or -1.
    """

    pages: torch.Tensor
    hot: torch.Tensor
    counts: torch.Tensor
    starts: torch.Tensor
    requests: torch.Tensor

    @staticmethod
    def empty(batch: int, pages: int, hot_pages: int, parts: int, device: torch.device) -> "DecodePlan":
        """Room for a plan of `batch` sequences of at most `pages` pages, `hot_pages` of them with hot rows."""
        sizes = ((batch, pages), (batch, hot_pages), (batch, 4), (batch + 1,), (parts,))
        return DecodePlan(*(torch.zeros(size, dtype=torch.int32, device=device) for size in sizes))

    def of(self, batch: int, parts: int) -> "DecodePlan":
        """The beginnings, for a smaller batch."""
        return DecodePlan(self.pages[:batch], self.hot[:batch], self.counts[:batch], self.starts[: batch + 1], self.requests[:parts])


def decode_parts(batch: int, kv_heads: int, group: int, multiprocessors: int) -> int:
    """Parts of a step: all that the GPU holds at once, and at least one of each sequence."""
    programs = MULTIPROCESSOR_PROGRAMS * multiprocessors // (kv_heads * triton.cdiv(group, PASS_HEADS.value))
    return max(min(programs, LARGEST_PARTS), batch)


@triton.jit(do_not_specialize=["row_stride", "page_stride", "list_stride"])
def _list_pages(
    req_to_token, req_rows, seq_lens, levels_ptr, plan_pages, list_ptr, count_ptr, row_stride, page_stride, list_stride,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """A request's pages; indices of those that hold hot rows, of one level together and in order, and their numbers."""
    request = tl.program_id(0)
    pages = (tl.load(seq_lens + request).to(tl.int32) + PAGE - 1) // PAGE
    row = tl.load(req_rows + request).to(tl.int64) * row_stride
    listed = 0
    for which in tl.static_range(4):
        before = listed
        for start in range(0, pages, CHUNK):
            index = start + tl.arange(0, CHUNK)
            if which == 0:
                page = tl.load(req_to_token + row + index * PAGE, mask=index < pages, other=0) // PAGE
                tl.store(plan_pages + request * page_stride + index, page, mask=index < pages)
            else:
                page = tl.load(plan_pages + request * page_stride + index, mask=index < pages, other=0)
            wanted = (tl.load(levels_ptr + page).to(tl.int32) == HOT_LEVELS[which]) & (index < pages)
            place = listed + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(list_ptr + request * list_stride + place, index, mask=wanted)
            listed += tl.sum(wanted.to(tl.int32), 0)
        tl.store(count_ptr + request * 4 + which, listed - before)


@triton.jit(do_not_specialize=["batch", "parts"])
def _assign_parts(seq_lens, count_ptr, starts_ptr, requests_ptr, batch, parts, B: tl.constexpr, CHUNK: tl.constexpr):
    """One program: parts of each sequence, and the sequence of each part."""
    request = tl.arange(0, B)
    there = request < batch
    pages = (tl.load(seq_lens + request, mask=there, other=0).to(tl.int32) + PAGE - 1) // PAGE
    records = pages - tl.load(count_ptr + request * 4, mask=there, other=0)
    tiles = tl.zeros([B], tl.int32)
    for which in tl.static_range(4):
        count = tl.load(count_ptr + request * 4 + which, mask=there, other=0)
        tiles += (count * (HOT_LEVELS[which] // 2) + TILE_BLOCKS - 1) // TILE_BLOCKS
    cost = records + HOT_TILE_COST * tiles
    least = there.to(tl.int32)
    low = PROGRAM_TILES + 0
    high = tl.maximum(tl.max(cost, 0), PROGRAM_TILES)
    while low < high:
        middle = (low + high) // 2
        fits = tl.sum(tl.maximum((cost + middle - 1) // middle, least), 0) <= parts
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)
    count = tl.maximum((cost + high - 1) // high, least)
    end = tl.cumsum(count, 0)
    tl.store(starts_ptr + request, end - count, mask=there)
    total = tl.sum(count, 0)
    tl.store(starts_ptr + batch, total)
    start = end - count
    for first in range(0, tl.max(count, 0), CHUNK):
        index = first + tl.arange(0, CHUNK)
        mine = index[None, :] < count[:, None]
        tl.store(requests_ptr + start[:, None] + index[None, :], request[:, None] + tl.zeros_like(index)[None, :], mask=mine)
    for first in range(total, parts, CHUNK):
        part = first + tl.arange(0, CHUNK)
        tl.store(requests_ptr + part, tl.full([CHUNK], -1, tl.int32), mask=part < parts)


def plan_decode(sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor], levels: torch.Tensor, plan: DecodePlan) -> None:
    """Make the plan of a step.

    Args:
        sequences: req_to_token int32 [R, C], rows of it int [B], tokens int [B].
        levels: uint8 [P].
        plan: written.
    """
    req_to_token, rows, lengths = sequences
    _list_pages[(len(rows),)](
        req_to_token, rows, lengths, levels, plan.pages, plan.hot, plan.counts, req_to_token.stride(0), plan.pages.stride(0),
        plan.hot.stride(0), CHUNK=1024, num_warps=4,
    )  # fmt: skip
    assign_parts(lengths, plan)


def assign_parts(lengths: torch.Tensor, plan: DecodePlan) -> None:
    """Starts and requests of a plan from the lengths and the counts of hot pages."""
    batch = len(lengths)
    width = max(16, triton.next_power_of_2(batch))
    _assign_parts[(1,)](
        lengths, plan.counts, plan.starts, plan.requests, batch, len(plan.requests), B=width, CHUNK=max(1, 4096 // width), num_warps=8
    )
