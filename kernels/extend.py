"""Extend attention, prefix part: new tokens against cached pages read in 2 bits and int8; no bf16 copy of the prefix exists.

A program holds 128 query rows, the G heads of a GQA group for 128 / G tokens, so that codes are unpacked once for all of them, and
reads four pages at a time. Specification: `attend` over the rows that `open` and `dequantise_rows` give
(oscar_radix.attention.backend).
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.pages import PAGE, attend_hot, key_operand, load_queries, softmax_step, store_planes, value_operand

ROWS = 128
"""Query rows of a program."""

TILE_PAGES = tl.constexpr(4)


def block_tokens(group: int) -> int:
    """Query tokens of a program, for `group` query heads a KV head (at most 128)."""
    return ROWS // triton.next_power_of_2(group)


@triton.jit(do_not_specialize=["row_stride"])
def _extend_prefix(
    query_ptr, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, levels_ptr,
    key_step, key_zero, key_masks, req_to_token, req_rows, prefix_lens, starts_ptr, lengths_ptr, block_request, block_first,
    out_ptr, lse_ptr, row_stride, softmax_scale,
    Hkv: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.load(block_request + block)
    first = tl.load(block_first + block)
    start = tl.load(starts_ptr + request)
    length = tl.load(lengths_ptr + request)
    prefix = tl.load(prefix_lens + request)
    # Row r is token r // GROUP, query head r % GROUP of the group (GROUP is G, rounded up to a power of two).
    member = tl.arange(0, M) % GROUP
    position = first + tl.arange(0, M) // GROUP
    row_ok = (position < length) & (member < G)
    rows = (start + position).to(tl.int64) * (Hkv * G) + head * G + member
    b0, b1, b2, b3, h0, h1, h2, h3, unit_b, unit_h, offset = load_queries(
        query_ptr, rows, row_ok, key_step, key_zero, head, softmax_scale, D
    )
    Q: tl.constexpr = D // 4
    masks = key_masks + head * D
    channel = tl.arange(0, Q)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    shift = tl.zeros([M], tl.float32)
    a0 = tl.zeros([M, Q], tl.float32)
    a1 = tl.zeros([M, Q], tl.float32)
    a2 = tl.zeros([M, Q], tl.float32)
    a3 = tl.zeros([M, Q], tl.float32)
    row = req_to_token + tl.load(req_rows + request).to(tl.int64) * row_stride
    token = tl.arange(0, TILE_PAGES * PAGE)
    for tile in range(0, prefix, TILE_PAGES * PAGE):
        valid = tile + token < prefix
        page = (tl.load(row + tile + token // PAGE * PAGE, mask=valid, other=0) // PAGE).to(tl.int64)
        hot = ((tl.load(row_masks + page * Hkv + head) >> (token % PAGE)) & 1) != 0
        keep = valid & ~hot
        record = (page * Hkv + head) * PAGE + token % PAGE
        if tl.sum(keep.to(tl.int32), 0) > 0:
            codes = tl.load(k_codes + record[:, None] * Q + channel[None, :])
            s = tl.dot(b0, tl.trans(key_operand(codes, masks, 0, D)))
            s = tl.dot(b1, tl.trans(key_operand(codes, masks, 1, D)), s)
            s = tl.dot(b2, tl.trans(key_operand(codes, masks, 2, D)), s)
            s = tl.dot(b3, tl.trans(key_operand(codes, masks, 3, D)), s)
            s = (s * unit_b[:, None] - offset[:, None]) * tl.load(scales + record * 2).to(tl.float32)[None, :]
            s = tl.where(keep[None, :], s, float("-inf"))
            top, factor, weights, total = softmax_step(s, top, total)
            weights *= tl.load(scales + record * 2 + 1).to(tl.float32)[None, :]
            shift = shift * factor + 1.5 * tl.sum(weights, 1)
            p = weights.to(tl.float16)
            codes = tl.load(v_codes + record[:, None] * Q + channel[None, :])
            a0 = tl.dot(p, value_operand(codes, 0), a0 * factor[:, None])
            a1 = tl.dot(p, value_operand(codes, 1), a1 * factor[:, None])
            a2 = tl.dot(p, value_operand(codes, 2), a2 * factor[:, None])
            a3 = tl.dot(p, value_operand(codes, 3), a3 * factor[:, None])
        if tl.sum((hot & valid).to(tl.int32), 0) > 0:
            for index in range(tile // PAGE, tl.minimum(tile // PAGE + TILE_PAGES, (prefix + PAGE - 1) // PAGE)):
                one = (tl.load(row + index * PAGE) // PAGE).to(tl.int64)
                level = tl.load(levels_ptr + one).to(tl.int32)
                if level > 0:
                    written = index * PAGE + tl.arange(0, PAGE) < prefix
                    top, total, shift, a0, a1, a2, a3 = attend_hot(
                        one, level, written, head, hot_k, hot_v, hot_scales, table_ptr,
                        h0, h1, h2, h3, unit_h, top, total, shift, a0, a1, a2, a3, Hkv, D,
                    )  # fmt: skip
    store_planes(out_ptr + (rows * D)[:, None], row_ok, a0, a1, a2, a3, total, shift, D)
    tl.store(lse_ptr + rows, (top + tl.log2(total)) * 0.6931471805599453, mask=row_ok)


def extend_prefix(
    query: torch.Tensor,
    layer_cache: tuple[torch.Tensor, ...],
    tables: tuple[torch.Tensor, torch.Tensor],
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sequences: tuple[torch.Tensor, ...],
    blocks: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Attention of the new tokens of a prefill batch to the cached tokens before them, in the value basis.

    Args:
        query: float32 [T, Hq, D] in the key basis, sequence after sequence.
        layer_cache, tables, key_parameters: as in `decode`.
        sequences: req_to_token int32 [R, C]; rows of it int [B], prefix lengths int [B], first tokens in the batch int [B],
            numbers of new tokens int [B].
        blocks: request and first position (relative to the prefix) of each block of `block_tokens(G)` query tokens, int32.
        out: float32 [T, Hq, D]; lse float32 [T, Hq], natural logarithm, -inf without a prefix; written.
        softmax_scale: multiplies the scores.
    """
    _, query_heads, dim = query.shape
    kv_heads = key_parameters[0].shape[0]
    group = query_heads // kv_heads
    req_to_token, *rest = sequences
    _extend_prefix[(len(blocks[0]), kv_heads)](
        query, *layer_cache, *tables, *key_parameters, req_to_token, *rest, *blocks, out, lse, req_to_token.stride(0),
        softmax_scale, Hkv=kv_heads, G=group, GROUP=triton.next_power_of_2(group), D=dim, M=ROWS, num_warps=8, num_stages=1,
    )  # fmt: skip
