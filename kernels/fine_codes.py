"""Codes of refined layers for decode: 4 * (the record's code) + low bits, put together a word at a time, as operands of tensor cores.

Low bits of K and V stand where 2-bit codes stand: bits 2i of a byte of K, of a half-word of V. Keys become unsigned bytes. Values become
fp16 subnormals code * 4**(i % 4) * 2**-24 (compare `record_words`): four planes as they stand, four shifted down by 8 bits.
"""

import triton
import triton.language as tl

from oscar_radix.kernels.warp import mma_fp16, mma_int8_uint8

_PLANE_BITS = [2 * (i % 4) for i in range(8)]
HIGH_MASKS = tl.constexpr(tuple((12 << bit) * 0x10001 for bit in _PLANE_BITS))
LOW_MASKS = tl.constexpr(tuple((3 << bit) * 0x10001 for bit in _PLANE_BITS))
FINE_POWERS = tl.constexpr(tuple(2.0 ** (22 - bit) for bit in _PLANE_BITS))
"""Codes enter the tensor core as code * 2**bit * 2**-24; a value is (code - 7.5) / 4 scales."""
FINE_ZERO = tl.constexpr(1.875)


@triton.jit
def fine_masks(masks):
    """Masks of a record's K operands, two bits further up: operands are at most 6 bits of a byte."""
    moved = ()
    for i in tl.static_range(len(masks)):
        moved = moved + (masks[i] << 2,)
    return moved


@triton.jit
def fine_key(word, low, mask, plane: tl.constexpr):
    """Bytes 4 * operand + low bits of K plane `plane`; mask of `fine_masks`."""
    high = (word << 2 if plane == 0 else word >> (2 * plane - 2)) & mask
    return high | ((low >> (2 * plane)) & 0x03030303)


@triton.jit
def fine_scores(w0, w1, low, query, masks, D: tl.constexpr = 128):
    """Fixed-point scores of 8 tokens, as `record_words.scores`; low: the words of low bits that go with w0 and w1."""
    zero = tl.zeros([32], tl.int32)
    c = (zero, zero, zero, zero)
    if D == 128:
        last = tl.full([32], 0x0C0C0C0C, tl.int32)
        l0, l1 = low
        c = mma_int8_uint8((query[0], query[1], query[2], query[3]), fine_key(w0, l0, masks[0], 0), fine_key(w1, l1, masks[3], 0), c)
        c = mma_int8_uint8((query[4], query[5], query[6], query[7]), fine_key(w0, l0, masks[1], 1), fine_key(w1, l1, masks[4], 1), c)
        c = mma_int8_uint8((query[8], query[9], query[10], query[11]), fine_key(w0, l0, masks[2], 2), fine_key(w1, l1, masks[3], 2), c)
        c = mma_int8_uint8((query[12], query[13], query[14], query[15]), fine_key(w0, l0, last, 3), fine_key(w1, l1, masks[4], 3), c)
    else:
        l0 = low[0]
        c = mma_int8_uint8((query[0], query[1], query[2], query[3]), fine_key(w0, l0, masks[0], 0), fine_key(w0, l0, masks[1], 1), c)
        c = mma_int8_uint8((query[4], query[5], query[6], query[7]), fine_key(w0, l0, masks[2], 2), fine_key(w0, l0, masks[3], 3), c)
    # Sums are up to 4032 * 4544, below 2**25: one rounding of float32.
    return (c[0] * 128 + c[2]).to(tl.float32), (c[1] * 128 + c[3]).to(tl.float32)


@triton.jit
def fine_shifts(word, low):
    """What `fine_plane` selects from: the record's word for planes 0 to 3 and 4 to 7, the low bits' likewise."""
    return word << 2, word >> 6, low, low >> 8


@triton.jit
def fine_plane(shifts, plane: tl.constexpr):
    """4 * code + low bits of V plane `plane`, two half-words."""
    high = (shifts[0] if plane < 4 else shifts[1]) & HIGH_MASKS[plane]
    return high | ((shifts[2] if plane < 4 else shifts[3]) & LOW_MASKS[plane])


@triton.jit
def add_fine_values(y, low, b0, b1, acc, D: tl.constexpr):
    """`record_words.add_values` of codes and low bits, both as `record_words.value_words`."""
    w0 = fine_shifts(y[0], low[0])
    w1 = fine_shifts(y[1], low[1])
    w2 = fine_shifts(y[2], low[2])
    w3 = fine_shifts(y[3], low[3])
    out = ()
    for i in tl.static_range(D // 16):
        if D == 128:
            a = fine_plane(w0, i), fine_plane(w1, i), fine_plane(w2, i), fine_plane(w3, i)
        else:
            a = fine_plane(w0, 2 * i), fine_plane(w1, 2 * i + 1), fine_plane(w2, 2 * i), fine_plane(w3, 2 * i + 1)
        out = out + mma_fp16(a, b0, b1, (acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]))
    return out
