"""Decode attention over a mixed-precision cache: split-KV stage 1 over pages, then a combine by log-sum-exp.

Specification: `attend` over the rows that `open` and `dequantise_rows` give (oscar_radix.attention.backend).
"""

import torch
import triton
import triton.language as tl
from oscar_radix.kernels.pages import PAGE, attend_page, load_queries, store_planes


@triton.jit
def _stage1(
    query_ptr, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, hot_numbers, table_ptr, levels_ptr, key_step, key_zero, key_masks,
    req_to_token, req_rows, seq_lens, out_ptr, lse_ptr, row_stride, softmax_scale, splits,
    Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    split = tl.program_id(1)
    request = tl.program_id(2)
    tokens = tl.load(seq_lens + request).to(tl.int32)
    pages = (tokens + PAGE - 1) // PAGE
    first = split * pages // splits
    last = (split + 1) * pages // splits
    member = tl.arange(0, M)
    row_ok = member < G
    rows = (request * Hkv + head) * G + member
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
    for index in range(first, last):
        page = (tl.load(req_to_token + row + index * PAGE) // PAGE).to(tl.int64)
        level = tl.load(levels_ptr + page).to(tl.int32)
        valid = index * PAGE + token < tokens
        top, total, shift, a0, a1, a2, a3 = attend_page(
            page, level, valid, head, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, hot_numbers, table_ptr, key_masks,
            b0, b1, b2, b3, h0, h1, h2, h3, unit_b, unit_h, offset, top, total, shift, a0, a1, a2, a3, Hkv, D,
        )  # fmt: skip

    target = out_ptr + ((rows * splits + split) * D)[:, None]
    store_planes(target, row_ok, a0, a1, a2, a3, total, shift, D)
    tl.store(lse_ptr + rows * splits + split, top + tl.log2(total), mask=row_ok)


@triton.jit
def _combine(
    partial_ptr, lse_ptr, rotation_ptr, mean_ptr, out_ptr, splits, G: tl.constexpr, Hq: tl.constexpr, D: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Merge the splits of one query head and leave the value basis: out = o R^T + mu."""
    row = tl.program_id(0)
    head = (row % Hq) // G
    split = tl.arange(0, S)
    channel = tl.arange(0, D)
    lse = tl.load(lse_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    weight = weight / tl.sum(weight, 0)
    parts = tl.load(partial_ptr + (row * splits + split)[:, None] * D + channel[None, :], mask=(weight > 0)[:, None], other=0.0)
    merged = tl.sum(parts * weight[:, None], 0)
    # rotation[e, c]: o R^T needs sum_c o_c R[e, c] for every model channel e.
    rotation = tl.load(rotation_ptr + head * D * D + channel[:, None] * D + channel[None, :])
    out = tl.sum(rotation * merged[None, :], 1) + tl.load(mean_ptr + head * D + channel)
    tl.store(out_ptr + row * D + channel, out.to(out_ptr.dtype.element_ty))


def decode(
    query: torch.Tensor,
    layer_cache: tuple[torch.Tensor, ...],
    tables: tuple[torch.Tensor, torch.Tensor],
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    value_parameters: tuple[torch.Tensor, torch.Tensor],
    sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    workspace: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Attention of one new token a request over its cached tokens, that token included.

    Args:
        query: float32 [B, Hq, D], in the key basis.
        layer_cache: k_codes, v_codes uint8 [P, Hkv, 32, D/4], scales fp16 [P, Hkv, 32, 2]; hot k, v int8 [N, Hkv, 2, D],
            hot scales fp16 [N, Hkv, 2, 2], hot row numbers uint8 [N, Hkv, 2]. All contiguous, of one layer.
        tables: block table int32 [P, 16], levels uint8 [P].
        key_parameters: key_step, key_zero float32 [Hkv, D]; key_masks uint8 [Hkv, 4, D/4].
        value_parameters: value_rotation float32 [Hkv, D, D], value_mean float32 [Hkv, D].
        sequences: req_to_token int32 [R, C], rows of it int [B], tokens int [B].
        workspace: partial outputs float32 [B, Hq, S, D], their log-sum-exp float32 [B, Hq, S]; S is the number of splits.
        out: [B, Hq, D], any float dtype; written.
        softmax_scale: multiplies the scores.
    """
    batch, query_heads, dim = query.shape
    kv_heads = key_parameters[0].shape[0]
    group = query_heads // kv_heads
    req_to_token, rows, lengths = sequences
    partial, lse = workspace
    splits = lse.shape[2]
    _stage1[(kv_heads, splits, batch)](
        query, *layer_cache, *tables, *key_parameters, req_to_token, rows, lengths, partial, lse, req_to_token.stride(0), softmax_scale,
        splits, Hkv=kv_heads, G=group, D=dim, M=max(16, triton.next_power_of_2(group)), num_warps=2 if dim <= 128 else 4,
    )  # fmt: skip
    _combine[(batch * query_heads,)](
        partial, lse, *value_parameters, out, splits, G=group, Hq=query_heads, D=dim, S=triton.next_power_of_2(splits), num_warps=4
    )
