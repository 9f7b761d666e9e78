"""Decode attention over 2-bit records at the speed of memory, head dims 64 and 128, up to 8 query heads a pass.

One warp a program; a page is a tile. QK runs on int8 tensor cores: the query times the key steps is 13-bit fixed point, split
into high and low parts in the fragment rows that GQA leaves idle, and `(word >> 2i) & mask` of the packed codes is the other
operand, whatever the widths. PV runs on fp16 tensor cores as O^T = V^T P^T: `word & (3 << 2i)` of the packed codes is an fp16
subnormal code * 4**i * 2**-24, exact in the tensor core; the powers of two come out at the end. Scales apply after the dot: s_k to
the score, s_v to the weight; zero points are one number a query (K) and 1.5 sum(p s_v) (V). The next page is loaded into
registers while this one is computed.
"""

import triton
import triton.language as tl

from oscar_radix.kernels.fixed_point import QUERY_LEVELS, fixed_point
from oscar_radix.kernels.online_softmax import NONE, column_sums, rescale, store_lse, weights
from oscar_radix.kernels.warp import (
    high_halves,
    load1,
    load2,
    load4,
    low_halves,
    mma_fp16,
    mma_int8,
    row_max,
    row_sum,
    select_halves,
    shuffle,
    store2,
    unpack_half2,
)

RECORD_BYTES = tl.constexpr(8)
"""Bytes of codes of K, or of V, in a page's record of one head, for each channel."""
# Plane i of V stands at bits 2i; planes 5 to 7 would lie in the exponent of an fp16 and are shifted down by 6 bits, three planes.
_PLANE_BITS = [2 * i if i < 5 else 2 * i - 6 for i in range(8)]
VALUE_MASKS = tl.constexpr(tuple((3 << bit) | (3 << (bit + 16)) for bit in _PLANE_BITS))
VALUE_POWERS = tl.constexpr(tuple(2.0 ** (24 - bit) for bit in _PLANE_BITS))
"""Codes enter the tensor core as code * 2**bit * 2**-24."""


@triton.jit
def query_channel(step, part, t, D: tl.constexpr):
    """First of the four channels that lane t multiplies in half `part` of QK step `step`."""
    return 32 * step + 8 * t + 4 * part if D == 128 else 32 * step + 16 * part + 4 * t


@triton.jit
def _query_operands(query_ptr, step_ptr, zero_ptr, row, t, D: tl.constexpr = 128):
    """Fixed-point operands of the query times the key steps.

    Returns:
        D / 8 words, for each step of 32 channels the four of an int8 A fragment (high and low parts of `query_channel` 0 and 1);
        zero point and 1 / scale of the row, float32.
    """
    values = ()
    offset = tl.zeros([32], tl.float32)
    largest = tl.zeros([32], tl.float32)
    for i in tl.static_range(D // 32):
        for part in tl.static_range(2):
            channel = query_channel(i, part, t, D)
            q = load4(query_ptr + row * D + channel)
            step = load4(step_ptr + channel)
            zero = load4(zero_ptr + channel)
            for j in tl.static_range(4):
                x = q[j].to(tl.float32, bitcast=True) * step[j].to(tl.float32, bitcast=True)
                offset += x * zero[j].to(tl.float32, bitcast=True)
                largest = tl.maximum(largest, tl.abs(x))
                values = values + (x,)
    offset = row_sum(offset)
    factor = QUERY_LEVELS / tl.maximum(row_max(largest), 1e-20)
    words = ()
    for i in tl.static_range(D // 16):
        words = words + fixed_point((values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]), factor)
    return words, offset * factor, 1.0 / factor


@triton.jit
def _load_page(k_ptr, v_ptr, s_ptr, record, g, t, D: tl.constexpr):
    """Registers of one page: K, of tokens 8n + g, bytes 8t..8t+7 (D = 64: 4t..4t+3); V, of tokens 16j + 2t + {0, 1, 8, 9}, the
    half-words 2g and 2g + 1 (D = 64: those of g and its neighbour); scales 8 words (tokens 8n + 2t and 8n + 2t + 1)."""
    k = ()
    v = ()
    s = ()
    at = record * (RECORD_BYTES * D)
    for n in tl.static_range(4):
        row = k_ptr + at + (8 * n + g) * (D // 4) + (D // 16) * t
        k = k + (load2(row) if D == 128 else (load1(row),))
    for n in tl.static_range(4):
        s = s + load2(s_ptr + record * 128 + (8 * n + 2 * t) * 4)
    for j in tl.static_range(2):
        row = v_ptr + at + (16 * j + 2 * t) * (D // 4) + (4 * g if D == 128 else 4 * (g // 2))
        v = v + (load1(row), load1(row + D // 4), load1(row + 2 * D), load1(row + D // 4 + 2 * D))
    return k, v, s


@triton.jit
def key_masks(masks_ptr, t, D: tl.constexpr = 128):
    """Masks of the lane's bytes. D = 128: planes 0, 1, 2 of its even word, whose plane 3 has 2 bits, and planes 0, 1 of its odd one,
    whose planes 2, 3 are like them (`codec.allocation`). D = 64: the four planes of its word."""
    at = (masks_ptr + (D // 16) * t).to(tl.pointer_type(tl.int32))
    row: tl.constexpr = D // 16
    masks = (tl.load(at), tl.load(at + row), tl.load(at + 2 * row))
    return masks + ((tl.load(at + 1), tl.load(at + row + 1)) if D == 128 else (tl.load(at + 3 * row),))


@triton.jit
def _scores(w0, w1, query, masks, D: tl.constexpr = 128):
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
def _value_words(v0, v1, v2, v3, g, D: tl.constexpr):
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
def _add_values(y, b0, b1, acc, D: tl.constexpr):
    """acc (4 values an MMA) += V^T P^T of 16 tokens; y: `_value_words`. An MMA has one plane (D = 128), or two."""
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


@triton.jit
def _tail(unwritten):
    """Bits of the last `unwritten` (0..31) of a page's 32 tokens: int32."""
    return tl.where(unwritten > 0, -1 << (32 - tl.maximum(unwritten, 1)), 0)


@triton.jit
def read_records(
    query_ptr, k_ptr, v_ptr, s_ptr, hot_mask_ptr, key_step, key_zero, masks_ptr, pages_ptr, tokens, first, last, head,
    out_ptr, lse_ptr, columns, members, softmax_scale, Hkv: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Pages first..last - 1 of a sequence of `tokens` tokens, hot tokens left out, for `members` (1..8) query heads.

    query_ptr: their first query; out_ptr, lse_ptr: where its result goes, that of the next head is `columns` rows further.
    """
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    current = tl.load(pages_ptr + first)
    following = tl.load(pages_ptr + tl.minimum(first + 1, last - 1))
    record = current.to(tl.int64) * Hkv + head
    mask = tl.load(hot_mask_ptr + record)
    k, v, s = _load_page(k_ptr, v_ptr, s_ptr, record, g, t, D)
    query, offset, unit = _query_operands(query_ptr, key_step + head * D, key_zero + head * D, tl.minimum(g, members - 1), t, D)
    exponent = unit * softmax_scale * 1.4426950408889634
    masks = key_masks(masks_ptr + head * D, t, D)
    top = tl.full([32], NONE, tl.float32)
    total = tl.zeros([32], tl.float32)
    shift = tl.zeros([32], tl.float32)
    acc = (tl.zeros([32], tl.float32),) * (D // 4)
    for index in range(first, last):
        next_record = following.to(tl.int64) * Hkv + head
        next_mask = tl.load(hot_mask_ptr + next_record)
        next_k, next_v, next_s = _load_page(k_ptr, v_ptr, s_ptr, next_record, g, t, D)
        # Bit i: token i is read elsewhere, or does not exist.
        skipped = mask | _tail(tl.maximum((index + 1) * 32 - tokens, 0))
        if skipped != -1:
            scores = ()
            scales = ()
            for n in tl.static_range(4):
                d0, d1 = _scores(k[(D // 64) * n], k[(D // 64) * n + D // 64 - 1], query, masks, D)
                ks0, vs0 = unpack_half2(s[2 * n])
                ks1, vs1 = unpack_half2(s[2 * n + 1])
                s0 = (d0 - offset) * ks0
                s1 = (d1 - offset) * ks1
                if skipped != 0:
                    bits = skipped >> (8 * n + 2 * t)
                    s0 = tl.where(bits & 1 == 0, s0, NONE)
                    s1 = tl.where(bits & 2 == 0, s1, NONE)
                scores = scores + (s0, s1)
                scales = scales + (vs0, vs1)
            top, factor, acc, base = rescale(scores, top, acc, exponent, t)
            total = total * factor
            shift = shift * factor
            for j in tl.static_range(2):
                b0, b1, sums, scaled = weights(scores, scales, exponent, base, j)
                total += sums
                shift += scaled
                acc = _add_values(_value_words(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3], g, D), b0, b1, acc, D)
                if j == 0:
                    # Here: earlier, registers would spill; at the end of the loop, its use would wait (5 % slower on an H100).
                    following = tl.load(pages_ptr + tl.minimum(index + 2, last - 1))
        else:
            following = tl.load(pages_ptr + tl.minimum(index + 2, last - 1))
        k = next_k
        v = next_v
        s = next_s
        mask = next_mask
    total, inverse, even_inverse, odd_inverse = column_sums(total, t)
    zero_point = 1.5 * row_sum(shift) * inverse
    even_zero = shuffle(zero_point, 8 * t)
    odd_zero = shuffle(zero_point, 8 * t + 4)
    target = out_ptr + 2 * t * columns * D + (2 * g if D == 128 else g)
    for i in tl.static_range(D // 16):
        lower = VALUE_POWERS[i if D == 128 else 2 * i]
        upper = VALUE_POWERS[i if D == 128 else 2 * i + 1]
        even0 = acc[4 * i] * (lower * even_inverse) - even_zero
        odd0 = acc[4 * i + 1] * (lower * odd_inverse) - odd_zero
        even1 = acc[4 * i + 2] * (upper * even_inverse) - even_zero
        odd1 = acc[4 * i + 3] * (upper * odd_inverse) - odd_zero
        if D == 128:
            store2(target + 16 * i, even0, even1, 2 * t < members)
            store2(target + columns * D + 16 * i, odd0, odd1, 2 * t + 1 < members)
        else:
            tl.store(target + 16 * i, even0, mask=2 * t < members)
            tl.store(target + 16 * i + 8, even1, mask=2 * t < members)
            tl.store(target + columns * D + 16 * i, odd0, mask=2 * t + 1 < members)
            tl.store(target + columns * D + 16 * i + 8, odd1, mask=2 * t + 1 < members)
    store_lse(lse_ptr, top, total, exponent, g, t, members, columns)
