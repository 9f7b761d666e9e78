"""Turn new K and V rows into int8 rows in the codec's basis and put them into the hot pool.

Specification: `Codec.keys_to_basis`, `values_to_basis`, `quantise_rows` and `HotPool.write`. The basis change is three tf32
products accumulated in float32 here (float64 there), so an int8 code may differ by one where a row lies within 1e-6 of a
rounding edge; what is made of the int8 rows afterwards (`seal`) is bit-identical.
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.pages import BLOCK_ROWS, PAGE, PAGE_BLOCKS

CHUNK = tl.constexpr(32)
LARGEST_VALUE = tl.constexpr(32768.0)
"""As `codec.int8_rows.LARGEST_VALUE`."""
ROWS = 16
"""Tokens of a program."""
COLUMNS = 32
"""Query channels of a program: a matrix of 64 KiB is read by several multiprocessors at once."""


@triton.jit
def _quantise(y):
    """int8 codes [M, D], fp16 scales [M] and whether a row is bad (NaN, Inf, beyond LARGEST_VALUE)."""
    largest = tl.max(tl.where(y == y, tl.abs(y), float("inf")), 1)
    bad = largest > LARGEST_VALUE
    scale = tl.where(bad, 0.0, tl.div_rn(largest, 127.0)).to(tl.float16)
    wide = scale.to(tl.float32)
    divisor = tl.where(wide > 0, wide, 1.0)[:, None] + tl.zeros_like(y)
    # Adding and subtracting 1.5 * 2**23 rounds to the nearest integer, ties to even, as torch.round does.
    codes = tl.div_rn(y, divisor) + 12582912.0 - 12582912.0
    codes = tl.where((wide > 0)[:, None], tl.minimum(tl.maximum(codes, -127.0), 127.0), 0.0)
    return codes.to(tl.int8), scale, bad


@triton.jit
def _times_matrix(
    row_ptr, stride, token, inside, mean_ptr, matrix_ptr, first,
    CENTRE: tl.constexpr, MULTIPLY: tl.constexpr, D: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Columns first..first + N - 1 of (x - mean) A of M rows, float32 [M, N]; without CENTRE of x A, without MULTIPLY x - mean."""
    if MULTIPLY:
        out_channel = first + tl.arange(0, N)
        acc = tl.zeros([M, N], tl.float32)
        for start in range(0, D, 32):
            channel = start + tl.arange(0, CHUNK)
            x = tl.load(row_ptr + token[:, None] * stride + channel[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
            if CENTRE:
                x -= tl.load(mean_ptr + channel)[None, :]
            acc = tl.dot(x, tl.load(matrix_ptr + channel[:, None] * D + out_channel[None, :]), acc, input_precision="tf32x3")
    else:
        channel = tl.arange(0, D)
        acc = tl.load(row_ptr + token[:, None] * stride + channel[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        acc -= tl.load(mean_ptr + channel)[None, :]
    return acc


@triton.jit
def store_hot_rows(
    y, token, inside, head, slots_ptr, hot_ptr, hot_scales, table_ptr, bad_ptr, which, Hkv: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Rows [M, D] in the basis into the hot pool where a row's page has blocks; bad rows are counted, and zeros.

    Returns int8 codes [M, D], fp16 scales [M] and whether a row is bad.
    """
    channel = tl.arange(0, D)
    codes, scale, bad = _quantise(y)
    slot = tl.load(slots_ptr + token, mask=inside, other=0).to(tl.int64)
    block = tl.load(table_ptr + slot // PAGE * PAGE_BLOCKS + slot % PAGE // BLOCK_ROWS)
    hot = inside & (block >= 0)
    at = (block.to(tl.int64) * Hkv + head) * BLOCK_ROWS + slot % PAGE % BLOCK_ROWS
    tl.store(hot_ptr + at[:, None] * D + channel[None, :], codes, mask=hot[:, None])
    tl.store(hot_scales + at * 2 + which, scale, mask=hot)
    count = tl.sum((bad & inside).to(tl.int32), 0)
    tl.atomic_add(bad_ptr, count, mask=count > 0)
    return codes, scale, bad


@triton.jit(do_not_specialize=["tokens"])
def _write_rows(
    q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, slots_ptr, key_mean, key_basis, query_basis, value_mean, value_rotation,
    hot_k, hot_v, hot_scales, table_ptr, query_out, bad_ptr, tokens,
    Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr, ROTATE: tl.constexpr, N: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * M + tl.arange(0, M)
    inside = token < tokens
    head = tl.program_id(1)
    # Keys and values first: they take longest.
    part = tl.program_id(2)
    matrix = head * D * D
    wide = token.to(tl.int64)
    if part == 0:
        key = _times_matrix(k_ptr + head * D, k_stride, wide, inside, key_mean + head * D, key_basis + matrix, 0, True, True, D, D, M)
        store_hot_rows(key, token, inside, head, slots_ptr, hot_k, hot_scales, table_ptr, bad_ptr, 0, Hkv, D)
    elif part == 1:
        mean = value_mean + head * D
        value = _times_matrix(v_ptr + head * D, v_stride, wide, inside, mean, value_rotation + matrix, 0, True, ROTATE, D, D, M)
        store_hot_rows(value, token, inside, head, slots_ptr, hot_v, hot_scales, table_ptr, bad_ptr, 1, Hkv, D)
    else:
        query_head = head * G + (part - 2) // (D // N)
        first = (part - 2) % (D // N) * N
        query = _times_matrix(q_ptr + query_head * D, q_stride, wide, inside, key_mean, query_basis + matrix, first, False, True, D, N, M)
        at = ((wide * Hkv * G + query_head) * D + first)[:, None] + tl.arange(0, N)[None, :]
        tl.store(query_out + at, query, mask=inside[:, None])


def write_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    parameters: tuple[torch.Tensor, ...],
    hot: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    query_out: torch.Tensor,
    bad_rows: torch.Tensor,
    rotate_values: bool,
) -> None:
    """One launch for a decode step: queries into the key basis, new K and V rows into the hot pool.

    Args:
        q: [B, Hq, D]; k, v: [B, Hkv, D], any float dtype, rows contiguous within a token.
        slots: int [B], slot of each new token; its page holds hot blocks, or the row is dropped (padding).
        parameters: key_mean [Hkv, D], key_basis [Hkv, D, D], query_basis [Hkv, D, D], value_mean, value_rotation, float32.
        hot: k and v rows int8 [N, Hkv, 2, D], scales fp16 [N, Hkv, 2, 2], of one layer.
        block_table: int32 [P, 16].
        query_out: float32 [B, Hq, D]; written.
        bad_rows: int32 [1]; rows with NaN, Inf or values beyond LARGEST_VALUE are added.
        rotate_values: False where the value projection already gives rotated values (`Codec.values_folded`).
    """
    batch, query_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = query_heads // kv_heads
    _write_rows[(triton.cdiv(batch, ROWS), kv_heads, group * (dim // COLUMNS) + 2)](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), slots, *parameters, *hot, block_table, query_out, bad_rows, batch,
        Hkv=kv_heads, G=group, D=dim, ROTATE=rotate_values, N=COLUMNS, M=ROWS, num_warps=8, num_stages=5,
    )  # fmt: skip
