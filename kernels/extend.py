"""Extend attention, direct: new tokens against cached pages, read in 2 bits and int8, and causally against their own chunk.

Nothing is written of the prefix: a program opens a tile of tokens at a time for 128 query rows, the heads of a GQA group for
128 / group tokens. For few new tokens, and wherever `extend_dense` (which opens each token once) does not exist. On Hopper `extend_hopper`
does this with specialised warps; the kernel here runs everywhere else and is the same computation. Small chunks on
long prefixes are split over the keys; the parts merge by log-sum-exp. Specification: `attend` over the rows that `open` and
`dequantise_rows` give (oscar_radix.attention.backend).
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.capability import compute_capability
from oscar_radix.kernels.extend_hopper import extend_hopper
from oscar_radix.kernels.extend_parts import merge_parts
from oscar_radix.kernels.extend_plan import ROWS
from oscar_radix.kernels.open_rows import TILE, as_words, key_constants, low_constants, open_tile
from oscar_radix.kernels.operands import halves
from oscar_radix.kernels.pages import softmax_step


@triton.jit
def _attend_tile(s, valid, values, top, total, acc):
    """Add one tile with scores s [M, TILE]."""
    top, factor, weights, total = softmax_step(tl.where(valid, s, float("-inf")), top, total)
    return top, total, tl.dot(weights.to(tl.float16), values, acc * factor[:, None])


@triton.jit(do_not_specialize=["row_stride", "splits", "total_rows"])
def _extend(
    query_ptr, k_ptr, v_ptr, k_codes, v_codes, scales, k_low, v_low, hot_k, hot_v, hot_scales, row_masks, table_ptr,
    key_step, key_zero, key_masks, mean_ptr, req_to_token, req_rows, prefix_lens, starts_ptr, lengths_ptr, block_request, block_first,
    out_ptr, lse_ptr, row_stride, splits, total_rows,
    Hkv: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PARTIAL: tl.constexpr, KEEP_LSE: tl.constexpr,
    M: tl.constexpr, REFINED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    split = tl.program_id(2)
    request = tl.load(block_request + block)
    first = tl.load(block_first + block)
    start = tl.load(starts_ptr + request)
    length = tl.load(lengths_ptr + request).to(tl.int32)
    prefix = tl.load(prefix_lens + request).to(tl.int32)
    row = req_to_token + tl.load(req_rows + request).to(tl.int64) * row_stride
    # Row r is token r // GROUP, query head r % GROUP of the group (GROUP is G, rounded up to a power of two).
    member = tl.arange(0, M) % GROUP
    position = first + tl.arange(0, M) // GROUP
    row_ok = (position < length) & (member < G)
    at_row = (start + position).to(tl.int64) * (Hkv * G) + head * G + member
    channel = tl.arange(0, D)
    query = tl.load(query_ptr + at_row[:, None] * D + channel[None, :], mask=row_ok[:, None], other=0.0)
    constants = key_constants(key_step, key_zero, key_masks, head, D, REFINED)
    low = low_constants(key_step, head, D) if REFINED else constants
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    token = tl.arange(0, TILE)
    prefix_tiles = (prefix + TILE - 1) // TILE
    tiles = prefix_tiles + (tl.minimum(first + M // GROUP, length) + TILE - 1) // TILE
    first_tile = split * tiles // splits
    last_tile = (split + 1) * tiles // splits
    for tile in range(first_tile, tl.minimum(last_tile, prefix_tiles)):
        at = tile * TILE + token
        keys, values = open_tile(
            at, prefix, row, head, constants, low, k_codes, v_codes, scales, k_low, v_low, hot_k, hot_v, hot_scales, row_masks, table_ptr,
            Hkv, D, REFINED,
        )  # fmt: skip
        top, total, acc = _attend_tile(tl.dot(query, tl.trans(halves(keys))), (at < prefix)[None, :], halves(values), top, total, acc)
    for tile in range(tl.maximum(first_tile, prefix_tiles), last_tile):
        at = (tile - prefix_tiles) * TILE + token
        own = ((start + at).to(tl.int64) * Hkv + head)[:, None] * D + channel[None, :]
        keys = tl.load(k_ptr + own, mask=(at < length)[:, None], other=0.0)
        values = tl.load(v_ptr + own, mask=(at < length)[:, None], other=0.0)
        top, total, acc = _attend_tile(tl.dot(query, tl.trans(keys)), at[None, :] <= position[:, None], values, top, total, acc)
    out = acc * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    lse = top + tl.log2(total)
    if PARTIAL:
        at_row += split.to(tl.int64) * total_rows
        tl.store(lse_ptr + at_row, lse, mask=row_ok)
    else:
        out += tl.load(mean_ptr + head * D + channel)[None, :]
        if KEEP_LSE:
            tl.store(lse_ptr + at_row, lse * 0.6931471805599453, mask=row_ok)
    tl.store(out_ptr + at_row[:, None] * D + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None])


def extend(
    query: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    layer_cache: tuple[torch.Tensor, ...],
    block_table: torch.Tensor,
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    value_mean: torch.Tensor,
    sequences: tuple[torch.Tensor, ...],
    blocks: tuple[torch.Tensor, torch.Tensor],
    splits: int,
    out: torch.Tensor,
    final_lse: torch.Tensor | None = None,
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Attention of the new tokens of a prefill batch to the cached tokens before them and, causally, to each other.

    Args:
        query: fp16 [T, Hq, D] in the key basis, times the softmax scale and log2(e), sequence after sequence.
        own: keys and values of the new tokens in their bases, fp16 [T, Hkv, D], contiguous.
        layer_cache: k_codes, v_codes uint8 [P, Hkv, 32, D/4], scales fp16 [P, Hkv, 32, 2]; hot k, v int8 [N, Hkv, 2, D],
            hot scales fp16 [N, Hkv, 2, 2]; row masks int32 [P, Hkv], bit i: token i is hot. All contiguous, of one layer.
        block_table: int32 [P, 16].
        key_parameters: key_step, key_zero float32 [Hkv, D]; key_masks uint8 [Hkv, 4, D/4].
        value_mean: V's mean in the value basis, float32 [Hkv, D]; it is added to the output.
        sequences: req_to_token int32 [R, C]; rows of it int [B], prefix lengths int [B], first tokens in the batch int [B],
            numbers of new tokens int [B].
        blocks: request and first position (relative to the prefix) of each of `query_blocks`, int32 [N] each.
        splits: parts of the keys, of `extend_splits`.
        out: [T, Hq, D] in the value basis, any float dtype; written.
        final_lse: float32 [T, Hq], natural logarithm, of scores in the key basis; written where it is given.
        low: of a refined layer, its low bits of K and V, uint8 [P, Hkv, 32, D/4].
    """
    tokens, query_heads, dim = query.shape
    kv_heads = own[0].shape[1]
    group = query_heads // kv_heads
    rows = tokens * query_heads
    k_codes, v_codes, scales, hot_k, hot_v, *rest = layer_cache
    codes, below, hot = (as_words(two) for two in ((k_codes, v_codes), low or (k_codes, v_codes), (hot_k, hot_v)))
    req_to_token, *where = sequences
    keep = final_lse is not None
    kept = final_lse if keep else value_mean
    target, lse = out, kept
    if splits > 1:
        target = torch.empty(splits, tokens, query_heads, dim, dtype=torch.float32, device=out.device)
        lse = torch.empty(splits, tokens, query_heads, dtype=torch.float32, device=out.device)
    arguments = (
        query, *own, *codes, scales, *below, *hot, *rest, block_table, *key_parameters, value_mean, req_to_token, *where, *blocks,
        target, lse, req_to_token.stride(0), splits, rows,
    )  # fmt: skip
    constants = {"Hkv": kv_heads, "G": group, "GROUP": triton.next_power_of_2(group), "D": dim, "PARTIAL": splits > 1}
    constants |= {"KEEP_LSE": keep and splits == 1, "REFINED": low is not None}
    grid = (kv_heads, len(blocks[0]), splits)
    if compute_capability(query) == 9:
        extend_hopper[grid](*arguments, **constants, num_warps=4)
    else:
        _extend[grid](*arguments, **constants, M=ROWS, num_warps=8, num_stages=1)
    if splits > 1:
        merge_parts(target, lse, value_mean, out, final_lse)
