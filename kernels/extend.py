"""Extend attention: new tokens against cached pages read in 2 bits and int8, then causally against their own chunk.

No bf16 copy of the prefix exists. Specification: oscar_radix.attention.backend.
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.pages import PAGE, attend_page, load_queries, softmax_step, store_planes, value_channels

BLOCK_TOKENS = 64
"""Query tokens of a program."""


@triton.jit
def _extend(
    query_ptr, key_ptr, value_ptr, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, levels_ptr,
    key_step, key_zero, key_masks, req_to_token, req_rows, prefix_lens, starts_ptr, lengths_ptr, block_request, block_first, out_ptr,
    row_stride, softmax_scale, Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    query_head = tl.program_id(1)
    head = query_head // G
    request = tl.load(block_request + block)
    first = tl.load(block_first + block)
    start = tl.load(starts_ptr + request)
    length = tl.load(lengths_ptr + request)
    prefix = tl.load(prefix_lens + request)
    position = first + tl.arange(0, M)
    row_ok = position < length
    rows = (start + position).to(tl.int64) * (Hkv * G) + query_head
    b0, b1, b2, b3, h0, h1, h2, h3, unit_b, unit_h, offset = load_queries(
        query_ptr, rows, row_ok, key_step, key_zero, head, softmax_scale, D
    )
    Q: tl.constexpr = D // 4
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    shift = tl.zeros([M], tl.float32)
    a0 = tl.zeros([M, Q], tl.float32)
    a1 = tl.zeros([M, Q], tl.float32)
    a2 = tl.zeros([M, Q], tl.float32)
    a3 = tl.zeros([M, Q], tl.float32)
    token = tl.arange(0, PAGE)
    row = tl.load(req_rows + request).to(tl.int64) * row_stride
    for index in range(0, (prefix + PAGE - 1) // PAGE):
        page = (tl.load(req_to_token + row + index * PAGE) // PAGE).to(tl.int64)
        level = tl.load(levels_ptr + page).to(tl.int32)
        valid = index * PAGE + token < prefix
        top, total, shift, a0, a1, a2, a3 = attend_page(
            page, level, valid, head, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_masks,
            b0, b1, b2, b3, h0, h1, h2, h3, unit_b, unit_h, offset, top, total, shift, a0, a1, a2, a3, True, Hkv, D,
        )  # fmt: skip

    # The own chunk: keys and values in the basis, unquantised.
    channel = tl.arange(0, Q)
    for index in range(0, (tl.minimum(first + M, length) + PAGE - 1) // PAGE):
        other = index * PAGE + token
        here = other < length
        source = ((start + other).to(tl.int64) * Hkv + head) * D
        k = key_ptr + source[:, None] + channel[None, :]
        s = tl.dot(h0, tl.trans(tl.load(k, mask=here[:, None], other=0.0).to(tl.float16)))
        s = tl.dot(h1, tl.trans(tl.load(k + Q, mask=here[:, None], other=0.0).to(tl.float16)), s)
        s = tl.dot(h2, tl.trans(tl.load(k + 2 * Q, mask=here[:, None], other=0.0).to(tl.float16)), s)
        s = tl.dot(h3, tl.trans(tl.load(k + 3 * Q, mask=here[:, None], other=0.0).to(tl.float16)), s)
        keep = here[None, :] & (other[None, :] <= position[:, None])
        s = tl.where(keep, s * unit_h[:, None], float("-inf"))
        top, factor, weights, total = softmax_step(s, top, total)
        shift = shift * factor
        p = weights.to(tl.float16)
        v = value_ptr + source[:, None]
        v0 = tl.load(v + value_channels(0, D)[None, :], mask=here[:, None], other=0.0).to(tl.float16)
        v1 = tl.load(v + value_channels(1, D)[None, :], mask=here[:, None], other=0.0).to(tl.float16)
        v2 = tl.load(v + value_channels(2, D)[None, :], mask=here[:, None], other=0.0).to(tl.float16)
        v3 = tl.load(v + value_channels(3, D)[None, :], mask=here[:, None], other=0.0).to(tl.float16)
        a0 = tl.dot(p, v0, a0 * factor[:, None])
        a1 = tl.dot(p, v1, a1 * factor[:, None])
        a2 = tl.dot(p, v2, a2 * factor[:, None])
        a3 = tl.dot(p, v3, a3 * factor[:, None])
    store_planes(out_ptr + (rows * D)[:, None], row_ok, a0, a1, a2, a3, total, shift, D)


def extend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layer_cache: tuple[torch.Tensor, ...],
    tables: tuple[torch.Tensor, torch.Tensor],
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sequences: tuple[torch.Tensor, ...],
    blocks: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Attention of the new tokens of a prefill batch, in the value basis.

    Args:
        query: float32 [T, Hq, D], key, value: float32 [T, Hkv, D], all in the basis, sequence after sequence.
        layer_cache, tables, key_parameters: as in `decode`.
        sequences: req_to_token int32 [R, C]; rows of it int [B], prefix lengths int [B], first tokens in the batch int [B],
            numbers of new tokens int [B].
        blocks: request and first position (relative to the prefix) of each block of BLOCK_TOKENS queries, int32.
        out: float32 [T, Hq, D]; written.
        softmax_scale: multiplies the scores.
    """
    _, query_heads, dim = query.shape
    kv_heads = key.shape[1]
    req_to_token, *rest = sequences
    _extend[(len(blocks[0]), query_heads)](
        query, key, value, *layer_cache, *tables, *key_parameters, req_to_token, *rest, *blocks, out, req_to_token.stride(0),
        softmax_scale, Hkv=kv_heads, G=query_heads // kv_heads, D=dim, M=BLOCK_TOKENS, num_warps=4,
    )  # fmt: skip
