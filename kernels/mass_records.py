"""Attention mass from 2-bit records at the speed of memory: one query a request, head dim 128, up to 8 query heads a KV head.

One warp a program, a page is a tile; scores as in `decode_records`, whose operands it shares. The weights of a token stand in the
eight lanes of its column, one head each; three exchanges sum them, and every lane adds one token.
"""

import triton
import triton.language as tl

from oscar_radix.kernels.decode_records import _query_operands, _tail
from oscar_radix.kernels.fine_codes import fine_masks, fine_scores
from oscar_radix.kernels.record_words import key_masks, scores
from oscar_radix.kernels.warp import exp2, load2, shuffle, unpack_half2

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _head_sum(x, lane):
    """Sum over the eight rows (heads) of a column."""
    x += shuffle(x, lane ^ 4)
    x += shuffle(x, lane ^ 8)
    return x + shuffle(x, lane ^ 16)


@triton.jit
def _logits(k_ptr, k_low, record, low_record, n, g, t, query, masks, refined, REFINED: tl.constexpr):
    """`scores` of tokens 8n + 2t and 8n + 2t + 1, with low bits where the layer is refined."""
    at = (8 * n + g) * 32 + 8 * t
    w0, w1 = load2(k_ptr + record * 1024 + at)
    if REFINED:
        if refined:
            first, second = fine_scores(w0, w1, load2(k_low + low_record * 1024 + at), query, fine_masks(masks))
        else:
            first, second = scores(w0, w1, query, masks)
    else:
        first, second = scores(w0, w1, query, masks)
    return first, second


@triton.jit(do_not_specialize=["record_pages", "slots", "count", "nearest"])
def mass_records(
    query_ptr, lse_ptr, k_ptr, s_ptr, k_low, low_places, hot_mask_ptr, key_step, key_zero, masks_ptr, lengths_ptr, entries, chunks,
    mass_ptr, visits_ptr, query_stride, lse_stride, record_pages, slots, count, nearest, softmax_scale,
    Hkv: tl.constexpr, G: tl.constexpr, REFINED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    chunk = chunks + tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    low_place = tl.load(low_places + layer).to(tl.int64) if REFINED else layer
    request = tl.load(chunk)
    first = tl.load(chunk + tl.num_programs(1))
    last = tl.load(chunk + 2 * tl.num_programs(1))
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    limit = tl.load(lengths_ptr + request).to(tl.int32) - nearest
    row = (request * Hkv + head) * G + tl.minimum(g, G - 1)
    lse = tl.load(lse_ptr + layer * lse_stride + row)
    counted = (g < G) & (tl.abs(lse) < float("inf"))
    base = tl.where(counted, -lse * LOG2_E, 0.0)
    parameters = (layer * Hkv + head) * 128
    query, offset, unit = _query_operands(query_ptr + layer * query_stride, key_step + parameters, key_zero + parameters, row, t)
    exponent = unit * softmax_scale * LOG2_E
    masks = key_masks(masks_ptr + parameters, t)
    # The lane's token: of columns 2t and 2t + 1 of the eight tokens n, n = g % 4.
    token = 8 * (g % 4) + 2 * t + g // 4
    first_query = tl.load(lse_ptr + request * (Hkv * G))
    for entry in range(first, last):
        page = tl.load(entries + entry).to(tl.int64)
        slot = tl.load(entries + count + entry).to(tl.int64)
        begin = tl.load(entries + 2 * count + entry) * 32
        record = (layer * record_pages + page) * Hkv + head
        skipped = tl.load(hot_mask_ptr + record) | _tail(tl.maximum(begin + 32 - limit, 0))
        if (begin < limit) & (skipped != -1):
            sums = tl.zeros([32], tl.float32)
            for n in tl.static_range(4):
                scale0, scale1 = load2(s_ptr + record * 128 + (8 * n + 2 * t) * 4)
                low_record = (low_place * record_pages + page) * Hkv + head
                d0, d1 = _logits(k_ptr, k_low, record, low_record, n, g, t, query, masks, low_place >= 0, REFINED)
                ks0, _ = unpack_half2(scale0)
                ks1, _ = unpack_half2(scale1)
                p0 = tl.minimum(exp2((d0 - offset) * ks0 * exponent + base), 1.0)
                p1 = tl.minimum(exp2((d1 - offset) * ks1 * exponent + base), 1.0)
                even = _head_sum(tl.where(counted, p0, 0.0), lane)
                odd = _head_sum(tl.where(counted, p1, 0.0), lane)
                sums = tl.where(g % 4 == n, tl.where(g < 4, even, odd), sums)
            keep = ((skipped >> token) & 1) == 0
            tl.atomic_add(mass_ptr + ((layer * slots + slot) * Hkv + head) * 32 + token, sums, mask=keep, sem="relaxed")
        if (layer == 0) & (head == 0) & (tl.abs(first_query) < float("inf")):
            tl.atomic_add(visits_ptr + slot * 32 + lane, tl.full([32], 1.0, tl.float32), mask=begin + lane < limit, sem="relaxed")
