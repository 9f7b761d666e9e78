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

from oscar_radix.kernels.fine_codes import FINE_POWERS, FINE_ZERO, add_fine_values, fine_masks, fine_scores
from oscar_radix.kernels.fixed_point import QUERY_LEVELS, fixed_point
from oscar_radix.kernels.online_softmax import NONE, column_sums, rescale, store_lse, weights
from oscar_radix.kernels.record_words import (
    VALUE_POWERS,
    add_values,
    key_masks,
    load_keys,
    load_scales,
    load_values,
    scores,
    value_words,
)
from oscar_radix.kernels.warp import load4, row_max, row_sum, shuffle, store2, unpack_half2


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
def _tail(unwritten):
    """Bits of the last `unwritten` (0..31) of a page's 32 tokens: int32."""
    return tl.where(unwritten > 0, -1 << (32 - tl.maximum(unwritten, 1)), 0)


@triton.jit
def read_records(
    query_ptr, k_ptr, v_ptr, s_ptr, k_low, v_low, hot_mask_ptr, key_step, key_zero, masks_ptr, pages_ptr, tokens, first, last, head,
    out_ptr, lse_ptr, columns, members, softmax_scale, Hkv: tl.constexpr, D: tl.constexpr, REFINED: tl.constexpr,
):  # fmt: skip
    """Pages first..last - 1 of a sequence of `tokens` tokens, hot tokens left out, for `members` (1..8) query heads.

    query_ptr: their first query; out_ptr, lse_ptr: where its result goes, that of the next head is `columns` rows further. k_low, v_low:
    low bits of a refined layer.
    """
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    current = tl.load(pages_ptr + first)
    following = tl.load(pages_ptr + tl.minimum(first + 1, last - 1))
    record = current.to(tl.int64) * Hkv + head
    mask = tl.load(hot_mask_ptr + record)
    k = load_keys(k_ptr, record, g, t, D)
    s = load_scales(s_ptr, record, t)
    v = load_values(v_ptr, record, g, t, D)
    if REFINED:
        kl = load_keys(k_low, record, g, t, D)
        vl = load_values(v_low, record, g, t, D)
    query, offset, unit = _query_operands(query_ptr, key_step + head * D, key_zero + head * D, tl.minimum(g, members - 1), t, D)
    exponent = unit * softmax_scale * 1.4426950408889634
    masks = key_masks(masks_ptr + head * D, t, D)
    if REFINED:
        masks = fine_masks(masks)
    top = tl.full([32], NONE, tl.float32)
    total = tl.zeros([32], tl.float32)
    shift = tl.zeros([32], tl.float32)
    acc = (tl.zeros([32], tl.float32),) * (D // 4)
    for index in range(first, last):
        next_record = following.to(tl.int64) * Hkv + head
        next_mask = tl.load(hot_mask_ptr + next_record)
        next_k = load_keys(k_ptr, next_record, g, t, D)
        next_s = load_scales(s_ptr, next_record, t)
        next_v = load_values(v_ptr, next_record, g, t, D)
        if REFINED:
            next_kl = load_keys(k_low, next_record, g, t, D)
            next_vl = load_values(v_low, next_record, g, t, D)
        # Bit i: token i is read elsewhere, or does not exist.
        skipped = mask | _tail(tl.maximum((index + 1) * 32 - tokens, 0))
        if skipped != -1:
            logits = ()
            scales = ()
            for n in tl.static_range(4):
                w0, w1 = k[(D // 64) * n], k[(D // 64) * n + D // 64 - 1]
                if REFINED:
                    d0, d1 = fine_scores(w0, w1, (kl[(D // 64) * n], kl[(D // 64) * n + D // 64 - 1]), query, masks, D)
                else:
                    d0, d1 = scores(w0, w1, query, masks, D)
                ks0, vs0 = unpack_half2(s[2 * n])
                ks1, vs1 = unpack_half2(s[2 * n + 1])
                s0 = (d0 - offset) * ks0
                s1 = (d1 - offset) * ks1
                if skipped != 0:
                    bits = skipped >> (8 * n + 2 * t)
                    s0 = tl.where(bits & 1 == 0, s0, NONE)
                    s1 = tl.where(bits & 2 == 0, s1, NONE)
                logits = logits + (s0, s1)
                scales = scales + (vs0, vs1)
            top, factor, acc, base = rescale(logits, top, acc, exponent, t)
            total = total * factor
            shift = shift * factor
            for j in tl.static_range(2):
                b0, b1, sums, scaled = weights(logits, scales, exponent, base, j)
                total += sums
                shift += scaled
                y = value_words(v[4 * j], v[4 * j + 1], v[4 * j + 2], v[4 * j + 3], g, D)
                if REFINED:
                    low = value_words(vl[4 * j], vl[4 * j + 1], vl[4 * j + 2], vl[4 * j + 3], g, D)
                    acc = add_fine_values(y, low, b0, b1, acc, D)
                else:
                    acc = add_values(y, b0, b1, acc, D)
                if j == 0:
                    # Here: earlier, registers would spill; at the end of the loop, its use would wait (5 % slower on an H100).
                    following = tl.load(pages_ptr + tl.minimum(index + 2, last - 1))
        else:
            following = tl.load(pages_ptr + tl.minimum(index + 2, last - 1))
        k = next_k
        v = next_v
        s = next_s
        if REFINED:
            kl = next_kl
            vl = next_vl
        mask = next_mask
    total, inverse, even_inverse, odd_inverse = column_sums(total, t)
    zero_point = (FINE_ZERO if REFINED else 1.5) * row_sum(shift) * inverse
    even_zero = shuffle(zero_point, 8 * t)
    odd_zero = shuffle(zero_point, 8 * t + 4)
    target = out_ptr + 2 * t * columns * D + (2 * g if D == 128 else g)
    for i in tl.static_range(D // 16):
        lower = (FINE_POWERS if REFINED else VALUE_POWERS)[i if D == 128 else 2 * i]
        upper = (FINE_POWERS if REFINED else VALUE_POWERS)[i if D == 128 else 2 * i + 1]
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
