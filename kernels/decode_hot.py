"""Stage 1 of decode attention over hot int8 rows at the speed of memory, head dim 128, up to 8 query heads a KV head.

One warp a program; a tile is 16 blocks, 32 rows: one page at level 32, two at level 8, four at level 4, eight at level 2 ... of a
list that is sorted by level, so that a tile's pages are alike. QK runs on int8 tensor cores with the rows as they are; PV on fp16
ones, every byte made an fp16 exactly. Compare `decode_records`.
"""

import triton
import triton.language as tl

from oscar_radix.kernels.decode_records import NONE, QUERY_LEVELS, WEIGHT_SHIFT
from oscar_radix.kernels.warp import (
    exp2,
    half2,
    high_bytes_to_half2,
    interleave_high,
    interleave_low,
    load2,
    load4,
    low_bytes_to_half2,
    mma_fp16,
    mma_int8,
    row_max,
    row_sum,
    shuffle,
    unpack_half2,
)

TILE_BLOCKS = tl.constexpr(16)
LEVEL_CLASSES = tl.constexpr(4)
"""Levels 32, 8, 4 and 2, in this order."""


@triton.jit
def _query_operands(query_ptr, row, t):
    """Fixed-point operands of the query, and 1 / scale of the row.

    16 words, for step i the four of an int8 A fragment: high and low parts of channels 32t + 8i + 0..3 and + 4..7.
    """
    values = ()
    largest = tl.zeros([32], tl.float32)
    for i in tl.static_range(32):
        x = tl.load(query_ptr + row * 128 + 32 * t + i)
        largest = tl.maximum(largest, tl.abs(x))
        values = values + (x,)
    factor = QUERY_LEVELS / tl.maximum(row_max(largest), 1e-20)
    words = ()
    for i in tl.static_range(8):
        high_word = tl.zeros([32], tl.int32)
        low_word = tl.zeros([32], tl.int32)
        for j in tl.static_range(4):
            fixed = tl.floor(values[4 * i + j] * factor + 0.5).to(tl.int32)
            high = (fixed + 64) >> 7
            high_word |= (high & 255) << (8 * j)
            low_word |= ((fixed - high * 128) & 255) << (8 * j)
        words = words + (high_word, low_word)
    return words, 1.0 / factor


@triton.jit
def _block(list_ptr, table_ptr, pages_ptr, item, place, blocks_per_page, last_item):
    """Number of the block at `place` (0..15) of a tile whose first page is entry `item` of the list; and its page's index."""
    index = tl.load(list_ptr + tl.minimum(item + place // blocks_per_page, last_item))
    page = tl.load(pages_ptr + index * 32) // 32
    return tl.load(table_ptr + page * TILE_BLOCKS + place % blocks_per_page).to(tl.int64), index


@triton.jit
def _value_operands(a, b, c, d):
    """A fragments of PV for one word of 4 channels: rows of tokens 2t, 2t + 1 (a, b) and 2t + 8, 2t + 9 (c, d), offset bytes."""
    first = interleave_low(a, b)
    second = interleave_low(c, d)
    third = interleave_high(a, b)
    fourth = interleave_high(c, d)
    lower = (low_bytes_to_half2(first), high_bytes_to_half2(first), low_bytes_to_half2(second), high_bytes_to_half2(second))
    upper = (low_bytes_to_half2(third), high_bytes_to_half2(third), low_bytes_to_half2(fourth), high_bytes_to_half2(fourth))
    return lower, upper


@triton.jit(do_not_specialize=["row_stride", "list_stride", "splits", "first_split", "total_splits"])
def hot_stage1(
    query_ptr, k_ptr, v_ptr, s_ptr, table_ptr, req_to_token, req_rows, seq_lens, list_ptr, count_ptr,
    out_ptr, lse_ptr, row_stride, list_stride, softmax_scale, splits, first_split, total_splits, Hkv: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    split = tl.program_id(1)
    request = tl.program_id(2)
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    tokens = tl.load(seq_lens + request).to(tl.int32)
    pages_ptr = req_to_token + tl.load(req_rows + request).to(tl.int64) * row_stride
    whole = tl.load(count_ptr + request * LEVEL_CLASSES)
    eights = tl.load(count_ptr + request * LEVEL_CLASSES + 1)
    fours = tl.load(count_ptr + request * LEVEL_CLASSES + 2)
    twos = tl.load(count_ptr + request * LEVEL_CLASSES + 3)
    # Tiles of the four classes, one after the other.
    end_whole = whole
    end_eights = end_whole + (eights + 3) // 4
    end_fours = end_eights + (fours + 7) // 8
    tiles = end_fours + (twos + 15) // 16
    first = split * tiles // splits
    last = (split + 1) * tiles // splits
    output_row = request * Hkv * G + head * G
    column = first_split + split
    if last > first:
        row = output_row + tl.minimum(g, G - 1)
        query, unit = _query_operands(query_ptr, row, t)
        exponent = unit * softmax_scale * 1.4426950408889634
        top = tl.full([32], NONE, tl.float32)
        total = tl.zeros([32], tl.float32)
        acc = (tl.zeros([32], tl.float32),) * 32
        even_head = t * 8
        odd_head = even_head + 4
        entries = list_ptr + request * list_stride
        for tile in range(first, last):
            # Class of the tile: blocks of each page, first entry of the class, its entries, first entry of the tile.
            blocks_per_page = tl.where(tile < end_whole, 16, tl.where(tile < end_eights, 4, tl.where(tile < end_fours, 2, 1)))
            start = tl.where(tile < end_whole, 0, whole)
            start += tl.where(tile < end_eights, 0, eights) + tl.where(tile < end_fours, 0, fours)
            count = tl.where(tile < end_whole, whole, tl.where(tile < end_eights, eights, tl.where(tile < end_fours, fours, twos)))
            before = tl.where(tile < end_eights, end_whole, tl.where(tile < end_fours, end_eights, end_fours))
            before = tl.where(tile < end_whole, 0, before)
            item = start + (tile - before) * (16 // blocks_per_page)
            last_item = start + count - 1
            k = ()
            v = ()
            s = ()
            keep = ()
            for n in tl.static_range(4):
                block, _ = _block(entries, table_ptr, pages_ptr, item, 4 * n + g // 2, blocks_per_page, last_item)
                at = k_ptr + ((block * Hkv + head) * 2 + g % 2) * 128 + 32 * t
                k = k + load4(at) + load4(at + 16)
            for n in tl.static_range(4):
                place = 4 * n + t
                block, index = _block(entries, table_ptr, pages_ptr, item, place, blocks_per_page, last_item)
                base = (block * Hkv + head) * 2
                s = s + load2(s_ptr + base * 2)
                v = v + load4(v_ptr + base * 128 + 16 * g) + load4(v_ptr + base * 128 + 128 + 16 * g)
                exists = item + place // blocks_per_page <= last_item
                # Only pages at level 32 can be partial: row r is token r.
                position = tl.where(blocks_per_page == 16, index * 32 + 2 * place, 0)
                keep = keep + (exists & (position < tokens), exists & (position + 1 < tokens))
            scores = ()
            scales = ()
            for n in tl.static_range(4):
                zero = tl.zeros([32], tl.int32)
                c = (zero, zero, zero, zero)
                for i in tl.static_range(4):
                    a = (query[4 * i], query[4 * i + 1], query[4 * i + 2], query[4 * i + 3])
                    c = mma_int8(a, k[8 * n + 2 * i], k[8 * n + 2 * i + 1], c)
                ks0, vs0 = unpack_half2(s[2 * n])
                ks1, vs1 = unpack_half2(s[2 * n + 1])
                s0 = tl.where(keep[2 * n], (c[0] * 128 + c[2]).to(tl.float32) * ks0, NONE)
                s1 = tl.where(keep[2 * n + 1], (c[1] * 128 + c[3]).to(tl.float32) * ks1, NONE)
                scores = scores + (s0, s1)
                scales = scales + (vs0, vs1)
            peak = tl.maximum(scores[0], scores[1])
            for n in tl.static_range(1, 4):
                peak = tl.maximum(peak, tl.maximum(scores[2 * n], scores[2 * n + 1]))
            new_top = tl.maximum(top, row_max(peak))
            factor = exp2((top - new_top) * exponent)
            top = new_top
            total = total * factor
            base_exponent = WEIGHT_SHIFT - new_top * exponent
            even_factor = shuffle(factor, even_head)
            odd_factor = shuffle(factor, odd_head)
            scaled = ()
            for i in tl.static_range(16):
                scaled = scaled + (acc[2 * i] * even_factor, acc[2 * i + 1] * odd_factor)
            acc = scaled
            for j in tl.static_range(2):
                words = ()
                for n in tl.static_range(2 * j, 2 * j + 2):
                    p0 = exp2(scores[2 * n] * exponent + base_exponent)
                    p1 = exp2(scores[2 * n + 1] * exponent + base_exponent)
                    total += p0 + p1
                    words = words + (half2(p0 * scales[2 * n], p1 * scales[2 * n + 1]),)
                added = ()
                for w in tl.static_range(4):
                    # v holds, for each n, 4 words of row 2(4n + t) and 4 of the next; tokens 2t.. are n = 2j, 2t + 8.. n = 2j + 1.
                    r0 = v[16 * j + w] ^ -2139062144
                    r1 = v[16 * j + 4 + w] ^ -2139062144
                    r2 = v[16 * j + 8 + w] ^ -2139062144
                    r3 = v[16 * j + 12 + w] ^ -2139062144
                    lower, upper = _value_operands(r0, r1, r2, r3)
                    added = added + mma_fp16(lower, words[0], words[1], (acc[8 * w], acc[8 * w + 1], acc[8 * w + 2], acc[8 * w + 3]))
                    added = added + mma_fp16(upper, words[0], words[1], (acc[8 * w + 4], acc[8 * w + 5], acc[8 * w + 6], acc[8 * w + 7]))
                acc = added
        total = row_sum(total)
        inverse = 1.0 / tl.maximum(total, 1e-30)
        even_inverse = shuffle(inverse, even_head)
        odd_inverse = shuffle(inverse, odd_head)
        target = out_ptr + ((output_row + 2 * t) * total_splits + column) * 128 + 16 * g
        odd_target = target + total_splits * 128
        for i in tl.static_range(16):
            # Step i // 2 of the 8 MMAs: rows g are channel 16g + 2 (i // 2), rows g + 8 the next.
            tl.store(target + i, acc[2 * i] * even_inverse, mask=2 * t < G)
            tl.store(odd_target + i, acc[2 * i + 1] * odd_inverse, mask=2 * t + 1 < G)
        lse = tl.where(top > NONE, top * exponent + tl.log2(total) - WEIGHT_SHIFT, float("-inf"))
        tl.store(lse_ptr + (output_row + g) * total_splits + column, lse, mask=(g < G) & (t == 0))
    else:
        empty = tl.full([32], float("-inf"), tl.float32)
        tl.store(lse_ptr + (output_row + g) * total_splits + column, empty, mask=(g < G) & (t == 0))
