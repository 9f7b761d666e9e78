"""Words of a page's 2-bit record as operands of tensor cores, for `decode_records` and `mass_records`."""

import triton
import triton.language as tl

from oscar_radix.kernels.warp import high_halves, load1, load2, low_halves, mma_fp16, mma_int8, select_halves

RECORD_BYTES = tl.constexpr(8)
"""Bytes of codes of K, or of V, in a page's record of one head, for each channel."""
# Plane i of V stands at bits 2i; planes 5 to 7 would lie in the exponent of an fp16 and are shifted down by 6 bits, three planes.
_PLANE_BITS = [2 * i if i < 5 else 2 * i - 6 for i in range(8)]
VALUE_MASKS = tl.constexpr(tuple((3 << bit) | (3 << (bit + 16)) for bit in _PLANE_BITS))
VALUE_POWERS = tl.constexpr(tuple(2.0 ** (24 - bit) for bit in _PLANE_BITS))
"""Codes enter the tensor core as code * 2**bit * 2**-24."""


@triton.jit
def load_keys(k_ptr, record, g, t, D: tl.constexpr):
    """Registers of one page's K: of tokens 8n + g, bytes 8t..8t+7 (D = 64: 4t..4t+3)."""
    k = ()
    for n in tl.static_range(4):
        row = k_ptr + record * (RECORD_BYTES * D) + (8 * n + g) * (D // 4) + (D // 16) * t
        k = k + (load2(row) if D == 128 else (load1(row),))
    return k


@triton.jit
def load_values(v_ptr, record, g, t, D: tl.constexpr):
    """Of its V: of tokens 16j + 2t + {0, 1, 8, 9}, the half-words 2g and 2g + 1 (D = 64: those of g and its neighbour)."""
    v = ()
    for j in tl.static_range(2):
        row = v_ptr + record * (RECORD_BYTES * D) + (16 * j + 2 * t) * (D // 4) + (4 * g if D == 128 else 4 * (g // 2))
        v = v + (load1(row), load1(row + D // 4), load1(row + 2 * D), load1(row + D // 4 + 2 * D))
    return v


@triton.jit
def load_scales(s_ptr, record, t):
    """8 words: tokens 8n + 2t and 8n + 2t + 1."""
    s = ()
    for n in tl.static_range(4):
        s = s + load2(s_ptr + record * 128 + (8 * n + 2 * t) * 4)
    return s


@triton.jit
def key_masks(masks_ptr, t, D: tl.constexpr = 128):
    """Masks of the lane's bytes. D = 128: planes 0, 1, 2 of its even word, whose plane 3 has 2 bits, and planes 0, 1 of its odd one,
    whose planes 2, 3 are like them (`codec.allocation`). D = 64: the four planes of its word."""
    at = (masks_ptr + (D // 16) * t).to(tl.pointer_type(tl.int32))
    row: tl.constexpr = D // 16
    masks = (tl.load(at), tl.load(at + row), tl.load(at + 2 * row))
    return masks + ((tl.load(at + 1), tl.load(at + row + 1)) if D == 128 else (tl.load(at + 3 * row),))


@triton.jit
def scores(w0, w1, query, masks, D: tl.constexpr = 128):
    """Fixed-point scores of 8 tokens: sum of query * operand for tokens 2t and 2t + 1 of the row's head, float32."""
    magic = tl.full([32], 0x4B400000, tl.int32)
    zero = tl.zeros([32], tl.int32)
    c = (zero, zero, magic, magic)
    if D == 128:
        c = mma_int8((query[0], query[1], query[2], query[3]), w0 & masks[0], w1 & masks[3], c)
        c = mma_int8((query[4], query[5], query[6], query[7]), (w0 >> 2) & masks[1], (w1 >> 2) & masks[4], c)
        c = mma_int8((query[8], query[9], query[10], query[11]), (w0 >> 4) & masks[2], (w1 >> 4) & masks[3], c)
        c = mma_int8((query[12], query[13], query[14], query[15]), (w0 >> 6) & 0x03030303, (w1 >> 6) & masks[4], c)
    else:
        c = mma_int8((query[0], query[1], query[2], query[3]), w0 & masks[0], (w0 >> 2) & masks[1], c)
        c = mma_int8((query[4], query[5], query[6], query[7]), (w0 >> 4) & masks[2], (w0 >> 6) & masks[3], c)
    # 1.5 * 2**23 + n as a float has the bits 0x4B400000 + n: the integer sum becomes a float by one subtraction.
    first = (c[0] * 128 + c[2]).to(tl.float32, bitcast=True) - 12582912.0
    second = (c[1] * 128 + c[3]).to(tl.float32, bitcast=True) - 12582912.0
    return first, second


@triton.jit
def value_words(v0, v1, v2, v3, g, D: tl.constexpr):
    """Operand words of tokens 2t, 2t + 1 and 2t + 8, 2t + 9: of rows g, rows g + 8, rows g, rows g + 8."""
    if D == 128:
        return low_halves(v0, v1), high_halves(v0, v1), low_halves(v2, v3), high_halves(v2, v3)
    # Rows g and g + 8 are two planes of the same half-word.
    half = tl.where(g % 2 == 0, 0x5410, 0x7632)
    first = select_halves(v0, v1, half)
    second = select_halves(v2, v3, half)
    return first, first, second, second


@triton.jit
def _plane(word, shifted, plane: tl.constexpr):
    """Codes of V plane `plane`; shifted = word >> 6, for the planes that would lie in the exponent."""
    return (word if plane < 5 else shifted) & VALUE_MASKS[plane]


@triton.jit
def add_values(y, b0, b1, acc, D: tl.constexpr):
    """acc (4 values an MMA) += V^T P^T of 16 tokens; y: `value_words`. An MMA has one plane (D = 128), or two."""
    y0, y1, y2, y3 = y
    z0 = y0 >> 6
    z1 = y1 >> 6
    z2 = y2 >> 6
    z3 = y3 >> 6
    out = ()
    for i in tl.static_range(D // 16):
        if D == 128:
            a = _plane(y0, z0, i), _plane(y1, z1, i), _plane(y2, z2, i), _plane(y3, z3, i)
        else:
            a = _plane(y0, z0, 2 * i), _plane(y1, z1, 2 * i + 1), _plane(y2, z2, 2 * i), _plane(y3, z3, 2 * i + 1)
        out = out + mma_fp16(a, b0, b1, (acc[4 * i], acc[4 * i + 1], acc[4 * i + 2], acc[4 * i + 3]))
    return out
