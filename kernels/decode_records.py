"""Stage 1 of decode attention over 2-bit records at the speed of memory, head dim 128, up to 8 query heads a KV head.

One warp a program; a page is a tile. QK runs on int8 tensor cores: the query times the key steps is 13-bit fixed point, split
into high and low parts in the fragment rows that GQA leaves idle, and `(word >> 2i) & mask` of the packed codes is the other
operand, whatever the widths. PV runs on fp16 tensor cores as O^T = V^T P^T: `word & (3 << 2i)` of the packed codes is an fp16
subnormal code * 4**i * 2**-24, exact in the tensor core; the powers of two come out at the end. Scales apply after the dot: s_k to
the score, s_v to the weight; zero points are one number a query (K) and 1.5 sum(p s_v) (V). The next page is loaded into
registers while this one is computed.
"""

import triton
import triton.language as tl

from oscar_radix.kernels.warp import (
    exp2,
    half2,
    high_halves,
    load1,
    load2,
    low_halves,
    mma_fp16,
    mma_int8,
    row_max,
    row_sum,
    shuffle,
    unpack_half2,
)

QUERY_LEVELS = tl.constexpr(4032.0)
"""Largest fixed-point query: 4032 * sum of the largest codes (960 over 128 channels) stays below 2**22."""
WEIGHT_SHIFT = tl.constexpr(6.0)
"""Weights are scaled by 2**6, so that fp16 keeps more of the small ones."""
NONE = tl.constexpr(-1e30)

# Plane i of V stands at bits 2i; planes 5 to 7 would lie in the exponent of an fp16 and are shifted down by 6 bits, three planes.
_PLANE_BITS = [2 * i if i < 5 else 2 * i - 6 for i in range(8)]
VALUE_MASKS = tl.constexpr(tuple((3 << bit) | (3 << (bit + 16)) for bit in _PLANE_BITS))
VALUE_POWERS = tl.constexpr(tuple(2.0 ** (24 - bit) for bit in _PLANE_BITS))
"""Codes enter the tensor core as code * 2**bit * 2**-24."""


@triton.jit
def _query_operands(query_ptr, step_ptr, zero_ptr, row, t):
    """Fixed-point operands of the query times the key steps.

    Returns:
        16 words, for plane i the four of an int8 A fragment (high and low parts of channels 32i + 8t + 0..3 and + 4..7);
        zero point and 1 / scale of the row, float32.
    """
    values = ()
    offset = tl.zeros([32], tl.float32)
    largest = tl.zeros([32], tl.float32)
    for i in tl.static_range(4):
        for j in tl.static_range(8):
            channel = 32 * i + 8 * t + j
            x = tl.load(query_ptr + row * 128 + channel) * tl.load(step_ptr + channel)
            offset += x * tl.load(zero_ptr + channel)
            largest = tl.maximum(largest, tl.abs(x))
            values = values + (x,)
    offset = row_sum(offset)
    factor = QUERY_LEVELS / tl.maximum(row_max(largest), 1e-20)
    words = ()
    for i in tl.static_range(4):
        for half in tl.static_range(2):
            high_word = tl.zeros([32], tl.int32)
            low_word = tl.zeros([32], tl.int32)
            for j in tl.static_range(4):
                fixed = tl.floor(values[8 * i + 4 * half + j] * factor + 0.5).to(tl.int32)
                high = (fixed + 64) >> 7
                high_word |= (high & 255) << (8 * j)
                low_word |= ((fixed - high * 128) & 255) << (8 * j)
            words = words + (high_word, low_word)
    return words, offset * factor, 1.0 / factor


@triton.jit
def _load_page(k_ptr, v_ptr, s_ptr, record, g, t):
    """Registers of one page: K 8 words (tokens 8n + g, bytes 8t..8t+7), V 8 words (tokens 16j + 2t + {0, 1, 8, 9}, half-words
    2g and 2g + 1), scales 8 words (tokens 8n + 2t and 8n + 2t + 1)."""
    k = ()
    v = ()
    s = ()
    at = record * 1024
    for n in tl.static_range(4):
        low, high = load2(k_ptr + at + (8 * n + g) * 32 + 8 * t)
        k = k + (low, high)
    for n in tl.static_range(4):
        first, second = load2(s_ptr + record * 128 + (8 * n + 2 * t) * 4)
        s = s + (first, second)
    for j in tl.static_range(2):
        row = v_ptr + at + (16 * j + 2 * t) * 32 + 4 * g
        v = v + (load1(row), load1(row + 32), load1(row + 256), load1(row + 288))
    return k, v, s


@triton.jit
def _scores(w0, w1, query, even0, even1, odd0, odd1):
    """Fixed-point scores of 8 tokens: sum of query * operand for tokens 2t and 2t + 1 of the row's head, float32."""
    magic = tl.full([32], 0x4B400000, tl.int32)
    zero = tl.zeros([32], tl.int32)
    c = (zero, zero, magic, magic)
    c = mma_int8((query[0], query[1], query[2], query[3]), w0 & even0, w1 & even1, c)
    c = mma_int8((query[4], query[5], query[6], query[7]), (w0 >> 2) & odd0, (w1 >> 2) & odd1, c)
    c = mma_int8((query[8], query[9], query[10], query[11]), (w0 >> 4) & even0, (w1 >> 4) & even1, c)
    c = mma_int8((query[12], query[13], query[14], query[15]), (w0 >> 6) & odd0, (w1 >> 6) & odd1, c)
    # 1.5 * 2**23 + n as a float has the bits 0x4B400000 + n: the integer sum becomes a float by one subtraction.
    first = (c[0] * 128 + c[2]).to(tl.float32, bitcast=True) - 12582912.0
    second = (c[1] * 128 + c[3]).to(tl.float32, bitcast=True) - 12582912.0
    return first, second


@triton.jit
def _add_values(v0, v1, v2, v3, b0, b1, acc):
    """acc (8 planes of 4) += V^T P^T of 16 tokens; v0..v3: packed codes of tokens 2t, 2t + 1, 2t + 8, 2t + 9."""
    y0 = low_halves(v0, v1)
    y1 = high_halves(v0, v1)
    y2 = low_halves(v2, v3)
    y3 = high_halves(v2, v3)
    out = ()
    for plane in tl.static_range(8):
        if plane == 5:
            y0 = y0 >> 6
            y1 = y1 >> 6
            y2 = y2 >> 6
            y3 = y3 >> 6
        a = (y0 & VALUE_MASKS[plane], y1 & VALUE_MASKS[plane], y2 & VALUE_MASKS[plane], y3 & VALUE_MASKS[plane])
        out = out + mma_fp16(a, b0, b1, (acc[4 * plane], acc[4 * plane + 1], acc[4 * plane + 2], acc[4 * plane + 3]))
    return out


@triton.jit
def _tail(unwritten):
    """Bits of the last `unwritten` (0..31) of a page's 32 tokens: int32."""
    return tl.where(unwritten > 0, -1 << (32 - tl.maximum(unwritten, 1)), 0)


@triton.jit(do_not_specialize=["splits", "total_splits"])
def records_stage1(
    query_ptr, k_ptr, v_ptr, s_ptr, hot_mask_ptr, key_step, key_zero, key_masks, req_to_token, req_rows, seq_lens,
    out_ptr, lse_ptr, row_stride, softmax_scale, splits, total_splits, Hkv: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    split = tl.program_id(1)
    request = tl.program_id(2)
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    tokens = tl.load(seq_lens + request).to(tl.int32)
    pages = (tokens + 31) // 32
    first = split * pages // splits
    last = (split + 1) * pages // splits
    pages_ptr = req_to_token + tl.load(req_rows + request).to(tl.int64) * row_stride
    output_row = request * Hkv * G + head * G
    if last > first:
        current = tl.load(pages_ptr + first * 32) // 32
        following = tl.load(pages_ptr + tl.minimum(first + 1, last - 1) * 32) // 32
        record = current.to(tl.int64) * Hkv + head
        mask = tl.load(hot_mask_ptr + record)
        k, v, s = _load_page(k_ptr, v_ptr, s_ptr, record, g, t)
        row = output_row + tl.minimum(g, G - 1)
        query, offset, unit = _query_operands(query_ptr, key_step + head * 128, key_zero + head * 128, row, t)
        exponent = unit * softmax_scale * 1.4426950408889634
        masks_at = (key_masks + head * 128 + 8 * t).to(tl.pointer_type(tl.int32))
        even0 = tl.load(masks_at)
        even1 = tl.load(masks_at + 1)
        odd0 = tl.load(masks_at + 8)
        odd1 = tl.load(masks_at + 9)
        top = tl.full([32], NONE, tl.float32)
        total = tl.zeros([32], tl.float32)
        shift = tl.zeros([32], tl.float32)
        acc = (tl.zeros([32], tl.float32),) * 32
        even_head = t * 8
        odd_head = even_head + 4
        for index in range(first, last):
            next_record = following.to(tl.int64) * Hkv + head
            next_mask = tl.load(hot_mask_ptr + next_record)
            next_k, next_v, next_s = _load_page(k_ptr, v_ptr, s_ptr, next_record, g, t)
            following = tl.load(pages_ptr + tl.minimum(index + 2, last - 1) * 32) // 32
            unwritten = tl.maximum((index + 1) * 32 - tokens, 0)
            # Bit i: token i is read elsewhere, or does not exist.
            skipped = mask | _tail(unwritten)
            if skipped != -1:
                scores = ()
                weights_scale = ()
                for n in tl.static_range(4):
                    d0, d1 = _scores(k[2 * n], k[2 * n + 1], query, even0, even1, odd0, odd1)
                    ks0, vs0 = unpack_half2(s[2 * n])
                    ks1, vs1 = unpack_half2(s[2 * n + 1])
                    s0 = (d0 - offset) * ks0
                    s1 = (d1 - offset) * ks1
                    if skipped != 0:
                        bits = skipped >> (8 * n + 2 * t)
                        s0 = tl.where(bits & 1 == 0, s0, NONE)
                        s1 = tl.where(bits & 2 == 0, s1, NONE)
                    scores = scores + (s0, s1)
                    weights_scale = weights_scale + (vs0, vs1)
                peak = tl.maximum(scores[0], scores[1])
                for n in tl.static_range(1, 4):
                    peak = tl.maximum(peak, tl.maximum(scores[2 * n], scores[2 * n + 1]))
                new_top = tl.maximum(top, row_max(peak))
                factor = exp2((top - new_top) * exponent)
                top = new_top
                total = total * factor
                shift = shift * factor
                base = WEIGHT_SHIFT - new_top * exponent
                even_factor = shuffle(factor, even_head)
                odd_factor = shuffle(factor, odd_head)
                scaled = ()
                for i in tl.static_range(16):
                    scaled = scaled + (acc[2 * i] * even_factor, acc[2 * i + 1] * odd_factor)
                acc = scaled
                for j in tl.static_range(2):
                    words = ()
                    for n in tl.static_range(2 * j, 2 * j + 2):
                        p0 = exp2(scores[2 * n] * exponent + base)
                        p1 = exp2(scores[2 * n + 1] * exponent + base)
                        total += p0 + p1
                        w0 = p0 * weights_scale[2 * n]
                        w1 = p1 * weights_scale[2 * n + 1]
                        shift += w0 + w1
                        words = words + (half2(w0, w1),)
                    acc = _add_values(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3], words[0], words[1], acc)
            k = next_k
            v = next_v
            s = next_s
            mask = next_mask
        total = row_sum(total)
        shift = row_sum(shift)
        inverse = 1.0 / tl.maximum(total, 1e-30)
        zero_point = 1.5 * shift * inverse
        even_inverse = shuffle(inverse, even_head)
        odd_inverse = shuffle(inverse, odd_head)
        even_zero = shuffle(zero_point, even_head)
        odd_zero = shuffle(zero_point, odd_head)
        target = out_ptr + ((output_row + 2 * t) * total_splits + split) * 128 + 2 * g
        odd_target = target + total_splits * 128
        for plane in tl.static_range(8):
            for upper in tl.static_range(2):
                even = acc[4 * plane + 2 * upper] * (VALUE_POWERS[plane] * even_inverse) - even_zero
                odd = acc[4 * plane + 2 * upper + 1] * (VALUE_POWERS[plane] * odd_inverse) - odd_zero
                tl.store(target + 16 * plane + upper, even, mask=2 * t < G)
                tl.store(odd_target + 16 * plane + upper, odd, mask=2 * t + 1 < G)
        lse = tl.where(top > NONE, top * exponent + tl.log2(total) - WEIGHT_SHIFT, float("-inf"))
        tl.store(lse_ptr + (output_row + g) * total_splits + split, lse, mask=(g < G) & (t == 0))
    else:
        empty = tl.full([32], float("-inf"), tl.float32)
        tl.store(lse_ptr + (output_row + g) * total_splits + split, empty, mask=(g < G) & (t == 0))
