"""Turn new K and V rows into int8 rows in the codec's basis and put them into the hot pool.

Specification: `Codec.keys_to_basis`, `values_to_basis`, `quantise_rows` and `HotPool.write`. The basis change accumulates in
float32 here (float64 there), so a code may differ by one where a row lies within 1e-6 of a rounding edge; what is made of the
int8 rows afterwards (`seal`) is bit-identical.
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.pages import BLOCK_ROWS, PAGE, PAGE_BLOCKS

CHUNK = tl.constexpr(32)


@triton.jit
def _times_matrix(row_ptr, mean_ptr, matrix_ptr, SUBTRACT: tl.constexpr, D: tl.constexpr):
    """(x - mean) A of one row, A [D, D] row-major: float32 [D]."""
    out_channel = tl.arange(0, D)
    acc = tl.zeros([D], tl.float32)
    for start in tl.static_range(0, D, 32):
        channel = start + tl.arange(0, CHUNK)
        x = tl.load(row_ptr + channel).to(tl.float32)
        if SUBTRACT:
            x -= tl.load(mean_ptr + channel)
        acc += tl.sum(x[:, None] * tl.load(matrix_ptr + channel[:, None] * D + out_channel[None, :]), 0)
    return acc


@triton.jit
def _quantise(y):
    """int8 codes, fp16 scale and whether the row is bad (NaN, Inf, or too large for an fp16 scale)."""
    largest = tl.max(tl.where(y == y, tl.abs(y), float("inf")), 0)
    scale = tl.div_rn(largest, 127.0).to(tl.float16)
    wide = scale.to(tl.float32)
    bad = (wide == float("inf")) | (wide != wide)
    usable = (wide > 0) & ~bad
    # Adding and subtracting 1.5 * 2**23 rounds to the nearest integer, ties to even, as torch.round does.
    codes = tl.div_rn(y, tl.where(usable, wide, 1.0)) + 12582912.0 - 12582912.0
    codes = tl.where(usable, tl.minimum(tl.maximum(codes, -127.0), 127.0), 0.0)
    return codes.to(tl.int8), tl.where(bad, 0.0, wide).to(tl.float16), bad


@triton.jit
def _store_hot(codes, scale, token_slot, head, rows_ptr, scales_ptr, table_ptr, WHICH: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr):
    """One row to its page's hot block, if the page has one."""
    page = token_slot // PAGE
    offset = token_slot % PAGE
    block = tl.load(table_ptr + page * PAGE_BLOCKS + offset // BLOCK_ROWS)
    if block >= 0:
        at = (block.to(tl.int64) * Hkv + head) * BLOCK_ROWS + offset % BLOCK_ROWS
        tl.store(rows_ptr + at * D + tl.arange(0, D), codes)
        tl.store(scales_ptr + at * 2 + WHICH, scale)


@triton.jit
def _decode_rows(
    q_ptr, k_ptr, v_ptr, q_stride, k_stride, v_stride, slots_ptr, key_mean, key_basis, query_basis, value_mean, value_rotation,
    hot_k, hot_v, hot_scales, table_ptr, query_out, bad_ptr,
    Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    part = tl.program_id(2)
    matrix = head * D * D
    if part < G:
        query = _times_matrix(q_ptr + token * q_stride + (head * G + part) * D, key_mean, query_basis + matrix, False, D)
        tl.store(query_out + ((token * Hkv + head) * G + part) * D + tl.arange(0, D), query)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if part == G:
            row = k_ptr + token * k_stride + head * D
            codes, scale, bad = _quantise(_times_matrix(row, key_mean + head * D, key_basis + matrix, True, D))
            _store_hot(codes, scale, slot, head, hot_k, hot_scales, table_ptr, 0, Hkv, D)
        else:
            row = v_ptr + token * v_stride + head * D
            codes, scale, bad = _quantise(_times_matrix(row, value_mean + head * D, value_rotation + matrix, True, D))
            _store_hot(codes, scale, slot, head, hot_v, hot_scales, table_ptr, 1, Hkv, D)
        tl.atomic_add(bad_ptr, bad.to(tl.int32), mask=bad)


@triton.jit
def _quantise_rows(
    key_ptr, value_ptr, slots_ptr, hot_k, hot_v, hot_scales, table_ptr, k8_ptr, v8_ptr, scales_ptr, bad_ptr,
    Hkv: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    channel = tl.arange(0, D)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    row = token * Hkv + head
    k = tl.load(key_ptr + row * D + channel)
    codes, scale, bad = _quantise(k)
    tl.store(key_ptr + row * D + channel, tl.where(bad, 0.0, k))
    tl.store(k8_ptr + row * D + channel, codes)
    tl.store(scales_ptr + row * 2, scale)
    _store_hot(codes, scale, slot, head, hot_k, hot_scales, table_ptr, 0, Hkv, D)
    tl.atomic_add(bad_ptr, bad.to(tl.int32), mask=bad)
    v = tl.load(value_ptr + row * D + channel)
    codes, scale, bad = _quantise(v)
    tl.store(value_ptr + row * D + channel, tl.where(bad, 0.0, v))
    tl.store(v8_ptr + row * D + channel, codes)
    tl.store(scales_ptr + row * 2 + 1, scale)
    _store_hot(codes, scale, slot, head, hot_v, hot_scales, table_ptr, 1, Hkv, D)
    tl.atomic_add(bad_ptr, bad.to(tl.int32), mask=bad)


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
) -> None:
    """One launch for a decode step: queries into the key basis, new K and V rows into the hot pool.

    Args:
        q: [B, Hq, D]; k, v: [B, Hkv, D], any float dtype, rows contiguous within a token.
        slots: int [B], slot of each new token; its page holds hot blocks, or the row is dropped (padding).
        parameters: key_mean [Hkv, D], key_basis [Hkv, D, D], query_basis [Hkv, D, D], value_mean, value_rotation, float32.
        hot: k and v rows int8 [N, Hkv, 2, D], scales fp16 [N, Hkv, 2, 2], of one layer.
        block_table: int32 [P, 16].
        query_out: float32 [B, Hq, D]; written.
        bad_rows: int32 [1]; rows with NaN or Inf are added.
    """
    batch, query_heads, dim = q.shape
    kv_heads = k.shape[1]
    group = query_heads // kv_heads
    _decode_rows[(batch, kv_heads, group + 2)](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), slots, *parameters, *hot, block_table, query_out, bad_rows,
        Hkv=kv_heads, G=group, D=dim, num_warps=4,
    )  # fmt: skip


def write_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    hot: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    block_table: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    bad_rows: torch.Tensor,
) -> None:
    """Rows of a prefill chunk, already in the basis: quantise, keep a copy, and store those whose pages hold hot blocks.

    Args:
        key, value: float32 [T, Hkv, D], contiguous; bad rows are zeroed in place.
        slots: int [T].
        hot, block_table, bad_rows: as in `write_decode`.
        rows: k8, v8 int8 [T, Hkv, D], scales fp16 [T, Hkv, 2] (K, V); written.
    """
    tokens, kv_heads, dim = key.shape
    _quantise_rows[(tokens, kv_heads)](
        key, value, slots, *hot, block_table, *rows, bad_rows, Hkv=kv_heads, D=dim, num_warps=1 if dim <= 128 else 2
    )
