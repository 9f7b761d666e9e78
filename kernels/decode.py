"""Decode attention over a mixed-precision cache: one stage 1 over records and hot rows, split over the keys, then a combine.

Stage 1 is one launch of one-warp programs that fill the GPU exactly once. Which of them read which sequence, its records or its hot rows,
is planned on the device once a step (decode_plan), so that a CUDA graph replays whatever the lengths and levels are.
Specification: `attend` over the rows that `open` and `dequantise_rows` give (oscar_radix.attention.backend).
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.capability import compute_capability
from oscar_radix.kernels.decode_hot import hot_tiles, read_hot
from oscar_radix.kernels.decode_plan import HOT_TILE_COST, PASS_HEADS, DecodePlan
from oscar_radix.kernels.decode_records import read_records
from oscar_radix.kernels.pages import PAGE

COMBINE_TILE = 8192
"""Partial outputs that a program of the combine loads at once: 64 registers a thread."""


@triton.jit
def _leave_empty(lse_ptr, slots, members):
    """A slot without keys, for `members` heads."""
    g = tl.arange(0, 32)
    tl.store(lse_ptr + g * slots, tl.full([32], float("-inf"), tl.float32), mask=g < members)


@triton.jit(do_not_specialize=["page_stride", "list_stride", "slots"])
def _stage1(
    query_ptr, k_codes, v_codes, scales, k_low, v_low, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_step, key_zero, key_masks,
    seq_lens, plan_pages, list_ptr, count_ptr, part_starts, part_requests, out_ptr, lse_ptr, page_stride, list_stride, softmax_scale, slots,
    Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PASSES: tl.constexpr, OVERLAP: tl.constexpr, REFINED: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0) // PASSES
    member = tl.program_id(0) % PASSES * PASS_HEADS
    part = tl.program_id(1)
    request = tl.load(part_requests + part)
    if request < 0:
        return
    split = part - tl.load(part_starts + request)
    members = tl.minimum(G - member, PASS_HEADS)
    tokens = tl.load(seq_lens + request).to(tl.int32)
    pages = (tokens + PAGE - 1) // PAGE
    counts, ends = hot_tiles(count_ptr + request * 4)
    tiles = ends[3]
    splits = tl.load(part_starts + request + 1) - tl.load(part_starts + request)
    # The part's share [low, high) of the sequence's cost, records before hot rows; at most one part of a sequence reads both.
    records = pages - counts[0]
    cost = records + HOT_TILE_COST * tiles
    low = split * cost // splits
    high = (split + 1) * cost // splits
    pages_ptr = plan_pages + request * page_stride
    query_head = head * G + member
    query = query_ptr + (request * Hkv * G + query_head) * D
    # A sequence has a slot more than parts: part i writes its records to slot i, its hot rows to slot i + 1.
    at = query_head * slots + part + request
    if low < records:
        read_records(
            query, k_codes, v_codes, scales, k_low, v_low, row_masks, key_step, key_zero, key_masks, pages_ptr, tokens,
            low * pages // records, tl.minimum(high, records) * pages // records, head, out_ptr + at * D, lse_ptr + at, slots, members,
            softmax_scale, Hkv, D, REFINED,
        )  # fmt: skip
    elif low == records:
        _leave_empty(lse_ptr + at, slots, members)
    first_tile = (tl.maximum(low - records, 0) + HOT_TILE_COST - 1) // HOT_TILE_COST
    last_tile = (tl.maximum(high - records, 0) + HOT_TILE_COST - 1) // HOT_TILE_COST
    if first_tile < last_tile:
        read_hot(
            query, hot_k, hot_v, hot_scales, table_ptr, pages_ptr, list_ptr + request * list_stride, counts, ends, tokens,
            first_tile, last_tile, head, out_ptr + (at + 1) * D, lse_ptr + at + 1, slots, members, softmax_scale, Hkv, D,
        )  # fmt: skip
    elif (high > records) | (split == splits - 1):
        _leave_empty(lse_ptr + at + 1, slots, members)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["slots"])
def _combine(
    partial_ptr, lse_ptr, part_starts, rotation_ptr, mean_ptr, out_ptr, final_lse_ptr, slots,
    G: tl.constexpr, Hq: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr,
    ROTATE: tl.constexpr, KEEP_LSE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Merge the slots of C channels of one query head, and leave the value basis: out = o R^T + mu; ROTATE needs all channels."""
    row = tl.program_id(0)
    head = (row % Hq) // G
    channel = tl.program_id(1) * C + tl.arange(0, C)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    request = row // Hq
    start = tl.load(part_starts + request)
    splits = tl.load(part_starts + request + 1) - start + 1
    at = (row % Hq) * slots + start + request
    every = tl.arange(0, S)
    lse = tl.load(lse_ptr + at + every, mask=every < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    total = tl.sum(tl.exp2(lse - top), 0)
    if KEEP_LSE:
        tl.store(final_lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453)
    merged = tl.zeros([C], tl.float32)
    for first in range(0, splits, CHUNK):
        split = first + tl.arange(0, CHUNK)
        weight = tl.exp2(tl.load(lse_ptr + at + split, mask=split < splits, other=float("-inf")) - top)
        # An empty slot has no output: its weight is 0 and it is not read.
        parts = tl.load(partial_ptr + (at + split)[:, None] * D + channel[None, :], mask=(weight > 0)[:, None], other=0.0)
        merged += tl.sum(parts * weight[:, None], 0)
    out = merged / total
    if ROTATE:
        # rotation[e, c]: o R^T needs sum_c o_c R[e, c] for every model channel e.
        rotation = tl.load(rotation_ptr + head * D * D + channel[:, None] * D + channel[None, :])
        out = tl.sum(rotation * out[None, :], 1)
    out += tl.load(mean_ptr + head * D + channel)
    tl.store(out_ptr + row * D + channel, out.to(out_ptr.dtype.element_ty))


def decode(
    query: torch.Tensor,
    layer_cache: tuple[torch.Tensor, ...],
    block_table: torch.Tensor,
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    value_parameters: tuple[torch.Tensor, torch.Tensor],
    lengths: torch.Tensor,
    plan: DecodePlan,
    workspace: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    softmax_scale: float,
    rotate_values: bool = True,
    final_lse: torch.Tensor | None = None,
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Attention of one new token a request over its cached tokens, that token included.

    Args:
        query: float32 [B, Hq, D], in the key basis; D is 64 or 128.
        layer_cache: k_codes, v_codes uint8 [P, Hkv, 32, D/4], scales fp16 [P, Hkv, 32, 2]; hot k, v int8 [N, Hkv, 2, D],
            hot scales fp16 [N, Hkv, 2, 2]; row masks int32 [P, Hkv], bit i: token i is hot. All contiguous, of one layer.
        block_table: int32 [P, 16].
        key_parameters: key_step, key_zero float32 [Hkv, D]; key_masks uint8 [Hkv, 4, D/4].
        value_parameters: value_rotation float32 [Hkv, D, D], value_mean float32 [Hkv, D].
        lengths: int [B], tokens.
        plan: of `plan_decode` for these sequences.
        workspace: partial outputs float32 [Hq, P + B, D], their log-sum-exp float32 [Hq, P + B]; P parts of the plan.
        out: [B, Hq, D], any float dtype; written.
        softmax_scale: multiplies the scores.
        rotate_values: False where the output projection takes rotated values (`Codec.values_folded`): the mean alone is added.
        final_lse: float32 [B, Hq], natural logarithm, of scores in the key basis; written where it is given.
        low: of a refined layer, its low bits of K and V, uint8 [P, Hkv, 32, D/4].
    """
    batch, query_heads, dim = query.shape
    if dim not in (64, 128):
        raise ValueError(f"decode kernels exist for head dims 64 and 128, not {dim}")
    kv_heads = key_parameters[0].shape[0]
    group = query_heads // kv_heads
    partial, lse = workspace
    slots = lse.shape[1]
    parts = slots - batch
    k_codes, v_codes, scales, *rest = layer_cache
    passes = triton.cdiv(group, PASS_HEADS.value)
    overlap = compute_capability(query) >= 9
    _stage1[(kv_heads * passes, parts)](
        query, k_codes, v_codes, scales.view(torch.uint8), *(low or (k_codes, v_codes)), *rest, block_table, *key_parameters, lengths,
        plan.pages, plan.hot, plan.counts, plan.starts, plan.requests, partial, lse, plan.pages.stride(0), plan.hot.stride(0),
        softmax_scale, slots, Hkv=kv_heads, G=group, D=dim, PASSES=passes,
        OVERLAP=overlap, REFINED=low is not None, num_warps=1, maxnreg=128, launch_pdl=overlap,
    )  # fmt: skip
    # Few rows: several programs each, while nothing needs all channels at once.
    channels = dim if rotate_values or batch * query_heads >= 200 else 32
    # What one sequence can have, if all others have one part; and about twice what it has if all are alike.
    most = triton.next_power_of_2(parts - batch + 2)
    chunk = min(most, COMBINE_TILE // channels, max(8, triton.next_power_of_2(2 * parts // batch)))
    _combine[(batch * query_heads, dim // channels)](
        partial, lse, plan.starts, *value_parameters, out, lse if final_lse is None else final_lse, slots, G=group, Hq=query_heads,
        D=dim, S=most, CHUNK=chunk, C=channels, ROTATE=rotate_values, KEEP_LSE=final_lse is not None, OVERLAP=overlap, num_warps=4,
        launch_pdl=overlap,
    )  # fmt: skip
