"""Decode attention over a mixed-precision cache: split-KV stage 1 over records and over hot rows, then a combine by log-sum-exp.

Specification: `attend` over the rows that `open` and `dequantise_rows` give (oscar_radix.attention.backend).
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.decode_hot import hot_stage1
from oscar_radix.kernels.decode_records import records_stage1
from oscar_radix.kernels.pages import PAGE, attend_page, load_queries, store_planes

HOT_LEVELS = tl.constexpr((32, 8, 4, 2))
"""Levels in the order of the list of hot pages."""


@triton.jit(do_not_specialize=["row_stride", "splits"])
def _stage1(
    query_ptr, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, levels_ptr, key_step, key_zero, key_masks,
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
            page, level, valid, head, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_masks,
            b0, b1, b2, b3, h0, h1, h2, h3, unit_b, unit_h, offset, top, total, shift, a0, a1, a2, a3, Hkv, D,
        )  # fmt: skip

    target = out_ptr + ((rows * splits + split) * D)[:, None]
    store_planes(target, row_ok, a0, a1, a2, a3, total, shift, D)
    tl.store(lse_ptr + rows * splits + split, top + tl.log2(total), mask=row_ok)


@triton.jit(do_not_specialize=["splits"])
def _combine(
    partial_ptr, lse_ptr, rotation_ptr, mean_ptr, out_ptr, splits,
    G: tl.constexpr, Hq: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one query head and leave the value basis: out = o R^T + mu."""
    row = tl.program_id(0)
    head = (row % Hq) // G
    channel = tl.arange(0, D)
    every = tl.arange(0, S)
    lse = tl.load(lse_ptr + row * splits + every, mask=every < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    total = tl.sum(tl.exp2(lse - top), 0)
    merged = tl.zeros([D], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        weight = tl.exp2(tl.load(lse_ptr + row * splits + split, mask=split < splits, other=float("-inf")) - top)
        # An empty split wrote no output: its weight is 0 and it is not read.
        parts = tl.load(partial_ptr + (row * splits + split)[:, None] * D + channel[None, :], mask=(weight > 0)[:, None], other=0.0)
        merged += tl.sum(parts * weight[:, None], 0)
    merged = merged / total
    # rotation[e, c]: o R^T needs sum_c o_c R[e, c] for every model channel e.
    rotation = tl.load(rotation_ptr + head * D * D + channel[:, None] * D + channel[None, :])
    out = tl.sum(rotation * merged[None, :], 1) + tl.load(mean_ptr + head * D + channel)
    tl.store(out_ptr + row * D + channel, out.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["row_stride", "list_stride"])
def _list_hot_pages(req_to_token, req_rows, seq_lens, levels_ptr, list_ptr, count_ptr, row_stride, list_stride, CHUNK: tl.constexpr):
    """Indices of a request's pages that hold hot rows, those of one level together and in order, and their numbers."""
    request = tl.program_id(0)
    pages = (tl.load(seq_lens + request).to(tl.int32) + PAGE - 1) // PAGE
    row = tl.load(req_rows + request).to(tl.int64) * row_stride
    listed = 0
    for which in tl.static_range(4):
        before = listed
        for start in range(0, pages, CHUNK):
            index = start + tl.arange(0, CHUNK)
            page = tl.load(req_to_token + row + index * PAGE, mask=index < pages, other=0) // PAGE
            wanted = (tl.load(levels_ptr + page).to(tl.int32) == HOT_LEVELS[which]) & (index < pages)
            place = listed + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(list_ptr + request * list_stride + place, index, mask=wanted)
            listed += tl.sum(wanted.to(tl.int32), 0)
        tl.store(count_ptr + request * 4 + which, listed - before)


def list_hot_pages(
    sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor], levels: torch.Tensor, hot: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Once a step: which pages of each request hold hot rows.

    Args:
        sequences: req_to_token int32 [R, C], rows of it int [B], tokens int [B].
        levels: uint8 [P].
        hot: page indices int32 [B, N], those of levels 32, 8, 4, 2 one after the other, and their numbers int32 [B, 4]; written.
    """
    req_to_token, rows, lengths = sequences
    pages, counts = hot
    _list_hot_pages[(len(rows),)](
        req_to_token, rows, lengths, levels, pages, counts, req_to_token.stride(0), pages.stride(0), CHUNK=1024, num_warps=4
    )


def has_fast_kernels(head_dim: int, group: int) -> bool:
    """Whether `records_stage1` and `hot_stage1` can read the cache; else the general stage 1 reads records and hot rows together."""
    return head_dim == 128 and group <= 8


def decode(
    query: torch.Tensor,
    layer_cache: tuple[torch.Tensor, ...],
    tables: tuple[torch.Tensor, torch.Tensor],
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    value_parameters: tuple[torch.Tensor, torch.Tensor],
    sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    hot: tuple[torch.Tensor, torch.Tensor],
    workspace: tuple[torch.Tensor, torch.Tensor],
    splits: tuple[int, int],
    out: torch.Tensor,
    softmax_scale: float,
) -> None:
    """Attention of one new token a request over its cached tokens, that token included.

    Args:
        query: float32 [B, Hq, D], in the key basis.
        layer_cache: k_codes, v_codes uint8 [P, Hkv, 32, D/4], scales fp16 [P, Hkv, 32, 2]; hot k, v int8 [N, Hkv, 2, D],
            hot scales fp16 [N, Hkv, 2, 2]; row masks int32 [P, Hkv], bit i: token i is hot. All contiguous, of one layer.
        tables: block table int32 [P, 16], levels uint8 [P].
        key_parameters: key_step, key_zero float32 [Hkv, D]; key_masks uint8 [Hkv, 4, D/4].
        value_parameters: value_rotation float32 [Hkv, D, D], value_mean float32 [Hkv, D].
        sequences: req_to_token int32 [R, C], rows of it int [B], tokens int [B].
        hot: of `list_hot_pages`.
        workspace: partial outputs float32 [B, Hq, S, D], their log-sum-exp float32 [B, Hq, S]; S is the sum of `splits`.
        splits: splits of the records and of the hot pages; (S, 0) where `has_fast_kernels` is False.
        out: [B, Hq, D], any float dtype; written.
        softmax_scale: multiplies the scores.
    """
    batch, query_heads, dim = query.shape
    kv_heads = key_parameters[0].shape[0]
    group = query_heads // kv_heads
    req_to_token, rows, lengths = sequences
    partial, lse = workspace
    record_splits, hot_splits = splits
    total = record_splits + hot_splits
    k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks = layer_cache
    if hot_splits:
        records_stage1[(kv_heads, record_splits, batch)](
            query, k_codes, v_codes, scales.view(torch.uint8), row_masks, *key_parameters, req_to_token, rows, lengths, partial, lse,
            req_to_token.stride(0), softmax_scale, record_splits, total, Hkv=kv_heads, G=group, num_warps=1, maxnreg=128,
        )  # fmt: skip
        hot_stage1[(kv_heads, hot_splits, batch)](
            query, hot_k, hot_v, hot_scales, tables[0], req_to_token, rows, lengths, *hot, partial, lse, req_to_token.stride(0),
            hot[0].stride(0), softmax_scale, hot_splits, record_splits, total, Hkv=kv_heads, G=group, num_warps=1, maxnreg=128,
        )  # fmt: skip
    else:
        _stage1[(kv_heads, record_splits, batch)](
            query, *layer_cache, *tables, *key_parameters, req_to_token, rows, lengths, partial, lse, req_to_token.stride(0),
            softmax_scale, record_splits, Hkv=kv_heads, G=group, D=dim, M=max(16, triton.next_power_of_2(group)),
            num_warps=2 if dim <= 128 else 4,
        )  # fmt: skip
    _combine[(batch * query_heads,)](
        partial, lse, *value_parameters, out, total, G=group, Hq=query_heads, D=dim, S=triton.next_power_of_2(total),
        CHUNK=min(32, triton.next_power_of_2(total)), num_warps=4,
    )  # fmt: skip
