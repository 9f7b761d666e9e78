"""Open tiles of a cached prefix: keys and values of its tokens, from 2-bit records and int8 rows, as pairs of fp16.

Specification: the rows that `Codec.open` and `dequantise_rows` give (oscar_radix.attention.backend).
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.extend_plan import ROUND_TILE
from oscar_radix.kernels.operands import LOW_MASKS, int8_rows, pair, pair_sum, record_keys, record_values, twice
from oscar_radix.kernels.pages import BLOCK_ROWS, PAGE, PAGE_BLOCKS

TILE = tl.constexpr(64)
"""Tokens of a tile."""


@triton.jit
def _set_bits(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 63


@triton.jit
def _plane_constants(key_step, key_zero, key_masks, head, plane: tl.constexpr, D: tl.constexpr, REFINED: tl.constexpr):
    """Mask, steps and shifts of one K plane (see `operands.key_plane`), [1, D / 16] each."""
    unit: tl.constexpr = (4.0 if REFINED else 1.0) * 0.25**plane
    at = head * D + plane * (D // 4) + tl.arange(0, D // 16) * 4
    mask = tl.load((key_masks + at).to(tl.pointer_type(tl.int32))) << (2 * plane)
    s0 = tl.load(key_step + at)
    s1 = tl.load(key_step + at + 1)
    s2 = tl.load(key_step + at + 2)
    s3 = tl.load(key_step + at + 3)
    low = pair(-s0 * tl.load(key_zero + at), -s1 * tl.load(key_zero + at + 1))
    high = pair(-s2 * tl.load(key_zero + at + 2), -s3 * tl.load(key_zero + at + 3))
    s0 = pair(s0 * unit, s1 * unit)
    s2 = pair(s2 * unit, s3 * unit)
    return mask[None, :], s0[None, :], s2[None, :], low[None, :], high[None, :]


@triton.jit
def key_constants(key_step, key_zero, key_masks, head, D: tl.constexpr, REFINED: tl.constexpr):
    """What `operands.record_keys` takes of one head; of a refined layer for codes, whose unit is 4 steps."""
    return (
        _plane_constants(key_step, key_zero, key_masks, head, 0, D, REFINED)
        + _plane_constants(key_step, key_zero, key_masks, head, 1, D, REFINED)
        + _plane_constants(key_step, key_zero, key_masks, head, 2, D, REFINED)
        + _plane_constants(key_step, key_zero, key_masks, head, 3, D, REFINED)
    )


@triton.jit
def _low_plane_constants(key_step, head, plane: tl.constexpr, D: tl.constexpr):
    at = head * D + plane * (D // 4) + tl.arange(0, D // 16) * 4
    unit: tl.constexpr = 0.25**plane
    mask = tl.full([1, D // 16], LOW_MASKS[plane], tl.int32)
    first = pair(tl.load(key_step + at) * unit, tl.load(key_step + at + 1) * unit)
    second = pair(tl.load(key_step + at + 2) * unit, tl.load(key_step + at + 3) * unit)
    shift = tl.zeros([1, D // 16], tl.int32)
    return mask, first[None, :], second[None, :], shift, shift


@triton.jit
def low_constants(key_step, head, D: tl.constexpr):
    """What `operands.record_keys` takes of one head of a refined layer for its low bits."""
    return (
        _low_plane_constants(key_step, head, 0, D)
        + _low_plane_constants(key_step, head, 1, D)
        + _low_plane_constants(key_step, head, 2, D)
        + _low_plane_constants(key_step, head, 3, D)
    )


@triton.jit
def _hot_rows(opened, hot, at, rows_ptr, scales_ptr, D: tl.constexpr, WHICH: tl.constexpr):
    """Opened rows, pairs [TILE, D / 2], with the hot tokens' int8 rows in their places."""
    rows = tl.load(rows_ptr + at[:, None] * (D // 4) + tl.arange(0, D // 4)[None, :], mask=hot[:, None], other=0)
    scale = tl.load(scales_ptr + at * 2 + WHICH, mask=hot, other=0.0)
    return tl.where(hot[:, None], int8_rows(rows, twice(scale)[:, None]), opened)


@triton.jit
def open_tile(
    at, prefix, row, head, constants, low, k_codes, v_codes, scales, k_low, v_low, hot_k, hot_v, hot_scales, row_masks, table_ptr,
    Hkv: tl.constexpr, D: tl.constexpr, REFINED: tl.constexpr,
):  # fmt: skip
    """Keys and values of tokens at [TILE] of a sequence, pairs [TILE, D / 2]; zeros beyond the prefix.

    Args:
        row: pointer to the sequence's slots.
        constants: of `key_constants`; low: of `low_constants`, in a refined layer.
    """
    valid = at < prefix
    page = (tl.load(row + at // PAGE * PAGE, mask=valid, other=0) // PAGE).to(tl.int64)
    record = (page * Hkv + head) * PAGE + at % PAGE
    word = tl.arange(0, D // 16)
    codes = tl.load(k_codes + record[:, None] * (D // 16) + word[None, :])
    words = tl.load(v_codes + record[:, None] * (D // 16) + word[None, :])
    k_scale = tl.load(scales + record * 2, mask=valid, other=0.0)
    v_scale = tl.load(scales + record * 2 + 1, mask=valid, other=0.0)
    keys = record_keys(codes, constants, twice(k_scale)[:, None])
    values = record_values(words, twice(v_scale)[:, None])
    if REFINED:
        codes = tl.load(k_low + record[:, None] * (D // 16) + word[None, :])
        words = tl.load(v_low + record[:, None] * (D // 16) + word[None, :])
        keys = pair_sum(keys, record_keys(codes, low, twice(k_scale)[:, None]))
        # (4 code + low - 7.5) / 4 = (code - 1.5) + (low - 1.5) / 4
        values = pair_sum(values, record_values(words, twice((v_scale * 0.25).to(tl.float16))[:, None]))
    # Row j of a page's hot rows is its j-th hot token.
    mask = tl.load(row_masks + page * Hkv + head)
    hot = (((mask >> (at % PAGE)) & 1) != 0) & valid
    if tl.sum(hot.to(tl.int32), 0) > 0:
        index = _set_bits(mask & ((1 << (at % PAGE)) - 1))
        block = tl.load(table_ptr + page * PAGE_BLOCKS + index // BLOCK_ROWS, mask=hot, other=0).to(tl.int64)
        hot_at = (block * Hkv + head) * BLOCK_ROWS + index % BLOCK_ROWS
        keys = _hot_rows(keys, hot, hot_at, hot_k, hot_scales, D, 0)
        values = _hot_rows(values, hot, hot_at, hot_v, hot_scales, D, 1)
    return keys, values


@triton.jit(do_not_specialize=["row_stride"])
def _open_prefix(
    tiles_ptr, k_codes, v_codes, scales, k_low, v_low, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_step, key_zero, key_masks,
    req_to_token, req_rows, prefix_lens, k_out, v_out, row_stride,
    Hkv: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, REFINED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) // TILES
    part = tl.program_id(0) % TILES
    head = tl.program_id(1)
    request = tl.load(tiles_ptr + tile * 2)
    token = part * TILE + tl.arange(0, TILE)
    prefix = tl.load(prefix_lens + request).to(tl.int32)
    row = req_to_token + tl.load(req_rows + request).to(tl.int64) * row_stride
    constants = key_constants(key_step, key_zero, key_masks, head, D, REFINED)
    low = low_constants(key_step, head, D) if REFINED else constants
    keys, values = open_tile(
        tl.load(tiles_ptr + tile * 2 + 1) + token, prefix, row, head, constants, low,
        k_codes, v_codes, scales, k_low, v_low, hot_k, hot_v, hot_scales, row_masks, table_ptr, Hkv, D, REFINED,
    )  # fmt: skip
    to = ((tile * TILES * TILE + token).to(tl.int64) * Hkv + head)[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
    tl.store(k_out + to, keys)
    tl.store(v_out + to, values)


def as_words(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes of K and V as 32-bit words."""
    return pair[0].view(torch.int32), pair[1].view(torch.int32)


def open_prefix(
    tiles: torch.Tensor,
    layer_cache: tuple[torch.Tensor, ...],
    block_table: torch.Tensor,
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rows: tuple[torch.Tensor, torch.Tensor],
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Open tiles of ROUND_TILE cached tokens, one after the other, to the beginning of `rows`; tokens beyond a prefix become 0.

    Args:
        tiles: int32 [N, 2], sequence and first token of each; of `ExtendRounds`.
        layer_cache, block_table, key_parameters, low: as in `extend`.
        sequences: req_to_token int32 [R, C]; rows of it int [B], prefix lengths int [B].
        rows: keys and values in their bases, fp16 [at least N * ROUND_TILE, Hkv, D], contiguous; written.
    """
    if not len(tiles):
        return
    kv_heads, dim = rows[0].shape[1:]
    k_codes, v_codes, scales, hot_k, hot_v, *rest = layer_cache
    codes, below, hot = (as_words(two) for two in ((k_codes, v_codes), low or (k_codes, v_codes), (hot_k, hot_v)))
    req_to_token, *where = sequences
    parts = ROUND_TILE // TILE.value
    _open_prefix[(len(tiles) * parts, kv_heads)](
        tiles, *codes, scales, *below, *hot, *rest, block_table, *key_parameters, req_to_token, *where, *as_words(rows),
        req_to_token.stride(0), Hkv=kv_heads, D=dim, TILES=parts, REFINED=low is not None, num_warps=4,
    )  # fmt: skip
