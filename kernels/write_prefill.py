"""Bring a prefill batch into the codec's bases: queries and keys and values in fp16 for `extend`, int8 rows for sealing and the hot pool.

Specification: `Codec.keys_to_basis`, `queries_to_basis`, `values_to_basis`, `quantise_rows` and `HotPool.write`. A basis change x A is
a sum of bf16 products: a number is the sum of bf16 terms of 8 bits each, a bf16 input of one, and A of three (24 bits), of which
queries, which are rounded to fp16 (11 bits) at the end, need two. The mean is subtracted in the basis, x A - mean A, so float32 rounds
relative to x and not to what is left: an int8 code may differ by one from the specification's near a rounding edge. A program keeps the
terms of its matrix for several blocks of tokens.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.write import LARGEST_VALUE, store_hot_rows

ROWS = 64
"""Tokens of a block."""
MOST_BLOCKS = 8
"""Blocks of tokens of a program."""
PROGRAMS = 1024
"""Programs that fill the GPU; with more blocks than that, a program takes several."""
ROW_TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}
"""bf16 terms that hold a number of each input type."""


@triton.jit
def _term(x, terms: tl.constexpr):
    """x without its `terms` leading bf16 terms, rounded to bf16: the next of them."""
    for _ in tl.static_range(terms):
        x -= x.to(tl.bfloat16).to(tl.float32)
    return x.to(tl.bfloat16)


@triton.jit
def _product(x, a0, a1, a2, X_TERMS: tl.constexpr, A_TERMS: tl.constexpr):
    """x A of [M, D] and the terms of A [D, D], in float32, the small products first."""
    acc = tl.zeros([x.shape[0], a0.shape[1]], tl.float32)
    for order in tl.static_range(A_TERMS - 1, -1, -1):
        for of_x in tl.static_range(X_TERMS):
            if of_x <= order:
                row = x if X_TERMS == 1 else _term(x.to(tl.float32), of_x)
                acc = tl.dot(row, a0 if order - of_x == 0 else a1 if order - of_x == 1 else a2, acc)
    return acc


@triton.jit
def _write_heads(
    row_ptr, stride, mean_ptr, matrix_ptr, slots_ptr, hot_ptr, hot_scales, table_ptr, half_ptr, int8_ptr, scales_ptr, bad_ptr,
    tokens, first, last, head, WHICH: tl.constexpr, ROTATE: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, X_TERMS: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    """Keys (WHICH 0) or values (1) of one head, blocks first..last - 1."""
    channel = tl.arange(0, D)
    mean = tl.load(mean_ptr + head * D + channel)
    if ROTATE:
        matrix = tl.load(matrix_ptr + head * D * D + channel[:, None] * D + channel[None, :])
        mean = tl.sum(mean[:, None] * matrix, 0)
        a0, a1, a2 = _term(matrix, 0), _term(matrix, 1), _term(matrix, 2)
    for block in range(first, last):
        token = (block * M + tl.arange(0, M)).to(tl.int64)
        inside = token < tokens
        x = tl.load(row_ptr + token[:, None] * stride + head * D + channel[None, :], mask=inside[:, None], other=0.0)
        y = _product(x, a0, a1, a2, X_TERMS, 3) if ROTATE else x.to(tl.float32)
        y -= mean[None, :]
        codes, scale, bad = store_hot_rows(y, token, inside, head, slots_ptr, hot_ptr, hot_scales, table_ptr, bad_ptr, WHICH, Hkv, D)
        row = token * Hkv + head
        at = row[:, None] * D + channel[None, :]
        tl.store(half_ptr + at, tl.where(bad[:, None], 0.0, y).to(tl.float16), mask=inside[:, None])
        tl.store(int8_ptr + at, codes, mask=inside[:, None])
        tl.store(scales_ptr + row * 2 + WHICH, scale, mask=inside)


@triton.jit(do_not_specialize=["tokens", "blocks"])
def _write_prefill(
    q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, slots_ptr, key_mean, key_basis, query_basis, value_mean, value_rotation,
    hot_k, hot_v, hot_scales, table_ptr, query_out, k_half, v_half, k8_ptr, v8_ptr, scales_ptr, bad_ptr, tokens, query_scale, blocks,
    Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROTATE: tl.constexpr, X_TERMS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    # Keys and values first: they take longest.
    part = tl.program_id(2)
    first = tl.program_id(0) * blocks
    last = tl.minimum(first + blocks, tl.cdiv(tokens, M))
    if part == 0:
        _write_heads(
            k_ptr, k_stride, key_mean, key_basis, slots_ptr, hot_k, hot_scales, table_ptr, k_half, k8_ptr, scales_ptr, bad_ptr,
            tokens, first, last, head, 0, True, Hkv, D, X_TERMS, M,
        )  # fmt: skip
    elif part == 1:
        _write_heads(
            v_ptr, v_stride, value_mean, value_rotation, slots_ptr, hot_v, hot_scales, table_ptr, v_half, v8_ptr, scales_ptr, bad_ptr,
            tokens, first, last, head, 1, ROTATE, Hkv, D, X_TERMS, M,
        )  # fmt: skip
    else:
        query_head = head * G + part - 2
        channel = tl.arange(0, D)
        matrix = tl.load(query_basis + head * D * D + channel[:, None] * D + channel[None, :])
        a0, a1 = _term(matrix, 0), _term(matrix, 1)
        for block in range(first, last):
            token = (block * M + tl.arange(0, M)).to(tl.int64)
            inside = token < tokens
            x = tl.load(q_ptr + token[:, None] * q_stride + query_head * D + channel[None, :], mask=inside[:, None], other=0.0)
            query = _product(x, a0, a1, a1, X_TERMS, 2) * query_scale
            # fp16 must not overflow.
            query = tl.minimum(tl.maximum(query, -LARGEST_VALUE), LARGEST_VALUE).to(tl.float16)
            tl.store(query_out + (token * Hkv * G + query_head)[:, None] * D + channel[None, :], query, mask=inside[:, None])


@dataclass(frozen=True)
class PrefillRows:
    """What `write_prefill` makes of T new tokens.

    query: fp16 [T, Hq, D] in the key basis; own: keys and values in their bases, fp16 [T, Hkv, D], contiguous, bad rows zeroed; int8:
    rows of keys and values, int8 [T, Hkv, D] each, with scales fp16 [T, Hkv, 2] (K, V).
    """

    query: torch.Tensor
    own: tuple[torch.Tensor, torch.Tensor]
    int8: tuple[torch.Tensor, torch.Tensor, torch.Tensor]

    @staticmethod
    def empty(query_shape: tuple[int, int, int], own: tuple[torch.Tensor, torch.Tensor]) -> "PrefillRows":
        """Room for it, with `own` given."""
        device, shape = own[0].device, own[0].shape
        rows = (torch.empty(shape, dtype=torch.int8, device=device) for _ in range(2))
        scales = torch.empty(*shape[:2], 2, dtype=torch.float16, device=device)
        return PrefillRows(torch.empty(query_shape, dtype=torch.float16, device=device), own, (*rows, scales))


def write_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    parameters: tuple[torch.Tensor, ...],
    hot: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    out: PrefillRows,
    query_scale: float,
    bad_rows: torch.Tensor,
    rotate_values: bool,
) -> None:
    """One launch for a prefill batch: queries, keys and values into their bases; rows whose pages hold hot blocks into the hot pool.

    Args:
        q: [T, Hq, D]; k, v: [T, Hkv, D], of one of ROW_TERMS' dtypes, rows contiguous within a token.
        slots: int [T].
        parameters, hot, block_table, bad_rows, rotate_values: as in `write_decode`.
        out: written.
        query_scale: multiplies the queries.
    """
    tokens, query_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = query_heads // kv_heads
    all_blocks = triton.cdiv(tokens, ROWS)
    blocks = max(1, min(MOST_BLOCKS, all_blocks * kv_heads * (group + 2) // PROGRAMS))
    _write_prefill[(triton.cdiv(all_blocks, blocks), kv_heads, group + 2)](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), slots, *parameters, *hot, block_table, out.query, *out.own, *out.int8, bad_rows,
        tokens, query_scale, blocks, Hkv=kv_heads, G=group, D=dim, ROTATE=rotate_values, X_TERMS=ROW_TERMS[q.dtype], M=ROWS, num_warps=4,
        num_stages=1,
    )  # fmt: skip
