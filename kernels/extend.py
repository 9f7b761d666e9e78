"""Extend attention, prefix part: new tokens against cached pages read in 2 bits and int8; no bf16 copy of the prefix exists.

Specification: `attend` over the rows that `open` and `dequantise_rows` give (oscar_radix.attention.backend).
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.pages import PAGE, attend_page, load_queries, store_planes

BLOCK_TOKENS = 64
"""Query tokens of a program."""


@triton.jit(do_not_specialize=["row_stride"])
def _extend_prefix(
    query_ptr, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, levels_ptr,
    key_step, key_zero, key_masks, req_to_token, req_rows, prefix_lens, starts_ptr, lengths_ptr, block_request, block_first,
    out_ptr, lse_ptr, row_stride, softmax_scale, Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
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
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    shift = tl.zeros([M], tl.float32)
    a0 = tl.zeros([M, D // 4], tl.float32)
    a1 = tl.zeros([M, D // 4], tl.float32)
    a2 = tl.zeros([M, D // 4], tl.float32)
    a3 = tl.zeros([M, D // 4], tl.float32)
    token = tl.arange(0, PAGE)
    row = tl.load(req_rows + request).to(tl.int64) * row_stride
    for index in range(0, (prefix + PAGE - 1) // PAGE):
        page = (tl.load(req_to_token + row + index * PAGE) // PAGE).to(tl.int64)
        level = tl.load(levels_ptr + page).to(tl.int32)
        valid = index * PAGE + token < prefix
        top, total, shift, a0, a1, a2, a3 = attend_page(
            page, level, valid, head, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_masks,
            b0, b1, b2, b3, h0, h1, h2, h3, unit_b, unit_h, offset, top, total, shift, a0, a1, a2, a3, Hkv, D,
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
        blocks: request and first position (relative to the prefix) of each block of BLOCK_TOKENS queries, int32.
        out: float32 [T, Hq, D]; lse float32 [T, Hq], natural logarithm, -inf without a prefix; written.
        softmax_scale: multiplies the scores.
    """
    _, query_heads, dim = query.shape
    kv_heads = key_parameters[0].shape[0]
    req_to_token, *rest = sequences
    _extend_prefix[(len(blocks[0]), query_heads)](
        query, *layer_cache, *tables, *key_parameters, req_to_token, *rest, *blocks, out, lse, req_to_token.stride(0),
        softmax_scale, Hkv=kv_heads, G=query_heads // kv_heads, D=dim, M=BLOCK_TOKENS, num_warps=4,
    )  # fmt: skip
