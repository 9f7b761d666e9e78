"""Lower the level of pages: keep the hot rows of largest score of each (layer, KV head) and move them to the page's first blocks.

Specification: `oscar_radix.kernels.keep_rows`. The rows move within the page's own blocks, so a page's rows are all read before any
is written.
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.pages import BLOCK_ROWS, PAGE, PAGE_BLOCKS

WARPS = 4


@triton.jit(do_not_specialize=["level", "hot_blocks", "record_pages"])
def _keep_rows(
    k_rows, v_rows, scales, row_numbers, row_masks, pages_ptr, blocks_ptr, scores_ptr, level, hot_blocks, record_pages,
    L: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    head = tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    place = tl.arange(0, PAGE)
    page = tl.load(pages_ptr + item).to(tl.int64)
    blocks = blocks_ptr + item * PAGE_BLOCKS
    block = tl.load(blocks + place // BLOCK_ROWS).to(tl.int64)
    held = block >= 0
    at = ((layer * hot_blocks + block) * Hkv + head) * BLOCK_ROWS + place % BLOCK_ROWS
    number = tl.load(row_numbers + at, mask=held, other=0).to(tl.int32)
    number = tl.where(tl.load(blocks + PAGE_BLOCKS - 1) >= 0, place, number)
    # A place without a row: lowest score, and a number above all tokens, so that no two places tie and rows rank before it.
    number = tl.where(held, number, PAGE + place)
    score = tl.load(scores_ptr + ((item.to(tl.int64) * L + layer) * Hkv + head) * PAGE + number, mask=held, other=float("-inf"))
    score = tl.where(score == score, score, float("-inf"))
    # The places as columns: element [i, j] compares place i with place j.
    column_number = tl.sum(tl.where(place[:, None] == place[None, :], number[:, None], 0), 0)
    column_score = tl.max(tl.where(place[:, None] == place[None, :], score[:, None], float("-inf")), 0)
    lower = number[:, None] < column_number[None, :]
    above = (score[:, None] > column_score[None, :]) | ((score[:, None] == column_score[None, :]) & lower)
    kept = tl.sum(above.to(tl.int32), 0) < level
    kept_row = tl.max(tl.where(place[:, None] == place[None, :], kept[None, :].to(tl.int32), 0), 1)
    goes_to = tl.sum(kept_row[:, None] * lower.to(tl.int32), 0)
    target_block = tl.load(blocks + goes_to // BLOCK_ROWS, mask=kept, other=0).to(tl.int64)
    target = ((layer * hot_blocks + target_block) * Hkv + head) * BLOCK_ROWS + goes_to % BLOCK_ROWS

    channel = tl.arange(0, D)
    k = tl.load(k_rows + at[:, None] * D + channel[None, :], mask=kept[:, None], other=0)
    v = tl.load(v_rows + at[:, None] * D + channel[None, :], mask=kept[:, None], other=0)
    k_scale = tl.load(scales + at * 2, mask=kept, other=0.0)
    v_scale = tl.load(scales + at * 2 + 1, mask=kept, other=0.0)
    # Rows are overwritten by rows of other lanes: all must be in registers before the first is stored.
    tl.debug_barrier()
    tl.store(k_rows + target[:, None] * D + channel[None, :], k, mask=kept[:, None])
    tl.store(v_rows + target[:, None] * D + channel[None, :], v, mask=kept[:, None])
    tl.store(scales + target * 2, k_scale, mask=kept)
    tl.store(scales + target * 2 + 1, v_scale, mask=kept)
    tl.store(row_numbers + target, number.to(tl.uint8), mask=kept)
    mask = tl.sum(tl.where(kept, 1 << (number & 31), 0), 0)
    tl.store(row_masks + (layer * record_pages + page) * Hkv + head, mask)


def keep_rows_kernel(
    hot: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    row_masks: torch.Tensor,
    pages: torch.Tensor,
    blocks: torch.Tensor,
    scores: torch.Tensor,
    level: int,
) -> None:
    """`keep_rows` of oscar_radix.kernels.keep_rows in one launch; hot buffers and scores contiguous."""
    layers, hot_blocks, kv_heads, _, dim = hot[0].shape
    if not len(pages):
        return
    _keep_rows[(len(pages), kv_heads, layers)](
        *hot, row_masks, pages, blocks, scores, level, hot_blocks, row_masks.shape[1], L=layers, Hkv=kv_heads, D=dim, num_warps=WARPS
    )
