"""Decode attention over hot int8 rows at the speed of memory, head dims 64 and 128, up to 8 query heads a pass.

One warp a program; a tile is 16 blocks, 32 rows: one page at level 32, two at level 8, four at level 4, eight at level 2 ... of a
list that is sorted by level, so that a tile's pages are alike. QK runs on int8 tensor cores with the rows as they are; PV on fp16
ones, every byte made an fp16 exactly. Compare `decode_records`.
"""

import triton
import triton.language as tl

from oscar_radix.kernels.fixed_point import QUERY_LEVELS, fixed_point
from oscar_radix.kernels.online_softmax import NONE, column_sums, rescale, store_lse, weights
from oscar_radix.kernels.warp import (
    high_bytes_to_half2,
    interleave_high,
    interleave_low,
    load2,
    load4,
    low_bytes_to_half2,
    mma_fp16,
    mma_int8,
    row_max,
    store4,
    unpack_half2,
)

TILE_BLOCKS = tl.constexpr(16)
LEVEL_CLASSES = tl.constexpr(4)
"""Levels 32, 8, 4 and 2, in this order."""


@triton.jit
def _query_operands(query_ptr, row, t, D: tl.constexpr):
    """Fixed-point operands of the query, and 1 / scale of the row.

    D / 8 words, for step i the four of an int8 A fragment: high and low parts of channels (D / 4) t + 8i + 0..3 and + 4..7.
    """
    values = ()
    largest = tl.zeros([32], tl.float32)
    for i in tl.static_range(D // 16):
        q = load4(query_ptr + row * D + (D // 4) * t + 4 * i)
        for j in tl.static_range(4):
            x = q[j].to(tl.float32, bitcast=True)
            largest = tl.maximum(largest, tl.abs(x))
            values = values + (x,)
    factor = QUERY_LEVELS / tl.maximum(row_max(largest), 1e-20)
    words = ()
    for i in tl.static_range(D // 16):
        words = words + fixed_point((values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]), factor)
    return words, 1.0 / factor


@triton.jit
def _block(list_ptr, table_ptr, pages_ptr, item, place, blocks_per_page, last_item):
    """Number of the block at `place` (0..15) of a tile whose first page is entry `item` of the list; and its page's index."""
    index = tl.load(list_ptr + tl.minimum(item + place // blocks_per_page, last_item))
    page = tl.load(pages_ptr + index)
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


@triton.jit
def hot_tiles(counts_ptr):
    """Numbers of pages in the four classes, and the tiles before which a class ends: (whole, eights, fours, twos), (four ends)."""
    whole = tl.load(counts_ptr)
    eights = tl.load(counts_ptr + 1)
    fours = tl.load(counts_ptr + 2)
    twos = tl.load(counts_ptr + 3)
    end_eights = whole + (eights + 3) // 4
    end_fours = end_eights + (fours + 7) // 8
    return (whole, eights, fours, twos), (whole, end_eights, end_fours, end_fours + (twos + 15) // 16)


@triton.jit
def _tile_class(tile, counts, ends):
    """Blocks of each page of a tile, its first entry in the list, and the last entry of its class."""
    whole, eights, fours, twos = counts
    in_whole = tile < ends[0]
    in_eights = tile < ends[1]
    in_fours = tile < ends[2]
    blocks = tl.where(in_whole, 16, tl.where(in_eights, 4, tl.where(in_fours, 2, 1)))
    start = tl.where(in_whole, 0, whole) + tl.where(in_eights, 0, eights) + tl.where(in_fours, 0, fours)
    count = tl.where(in_whole, whole, tl.where(in_eights, eights, tl.where(in_fours, fours, twos)))
    before = tl.where(in_whole, 0, tl.where(in_eights, ends[0], tl.where(in_fours, ends[1], ends[2])))
    return blocks, start + (tile - before) * (16 // blocks), start + count - 1


@triton.jit
def read_hot(
    query_ptr, k_ptr, v_ptr, s_ptr, table_ptr, pages_ptr, entries, counts, ends, tokens, first, last, head,
    out_ptr, lse_ptr, columns, members, softmax_scale, Hkv: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Tiles first..last - 1 of a sequence's hot rows, for `members` (1..8) query heads; arguments as in `read_records`.

    entries: the sequence's list of hot pages; counts, ends: `hot_tiles`.
    """
    lane = tl.arange(0, 32)
    g = lane // 4
    t = lane % 4
    query, unit = _query_operands(query_ptr, tl.minimum(g, members - 1), t, D)
    exponent = unit * softmax_scale * 1.4426950408889634
    top = tl.full([32], NONE, tl.float32)
    total = tl.zeros([32], tl.float32)
    acc = (tl.zeros([32], tl.float32),) * (D // 4)
    for tile in range(first, last):
        blocks_per_page, item, last_item = _tile_class(tile, counts, ends)
        k = ()
        v = ()
        s = ()
        keep = ()
        for n in tl.static_range(4):
            block, _ = _block(entries, table_ptr, pages_ptr, item, 4 * n + g // 2, blocks_per_page, last_item)
            at = k_ptr + ((block * Hkv + head) * 2 + g % 2) * D + (D // 4) * t
            for i in tl.static_range(D // 64):
                k = k + load4(at + 16 * i)
        for n in tl.static_range(4):
            place = 4 * n + t
            block, index = _block(entries, table_ptr, pages_ptr, item, place, blocks_per_page, last_item)
            base = (block * Hkv + head) * 2
            s = s + load2(s_ptr + base * 2)
            for row in tl.static_range(2):
                at = v_ptr + (base + row) * D + (D // 8) * g
                v = v + (load4(at) if D == 128 else load2(at))
            exists = item + place // blocks_per_page <= last_item
            # Only pages at level 32 can be partial: row r is token r.
            position = tl.where(blocks_per_page == 16, index * 32 + 2 * place, 0)
            keep = keep + (exists & (position < tokens), exists & (position + 1 < tokens))
        scores = ()
        scales = ()
        for n in tl.static_range(4):
            zero = tl.zeros([32], tl.int32)
            c = (zero, zero, zero, zero)
            for i in tl.static_range(D // 32):
                a = (query[4 * i], query[4 * i + 1], query[4 * i + 2], query[4 * i + 3])
                c = mma_int8(a, k[n * (D // 16) + 2 * i], k[n * (D // 16) + 2 * i + 1], c)
            ks0, vs0 = unpack_half2(s[2 * n])
            ks1, vs1 = unpack_half2(s[2 * n + 1])
            s0 = tl.where(keep[2 * n], (c[0] * 128 + c[2]).to(tl.float32) * ks0, NONE)
            s1 = tl.where(keep[2 * n + 1], (c[1] * 128 + c[3]).to(tl.float32) * ks1, NONE)
            scores = scores + (s0, s1)
            scales = scales + (vs0, vs1)
        top, factor, acc, base_exponent = rescale(scores, top, acc, exponent, t)
        total = total * factor
        for j in tl.static_range(2):
            b0, b1, sums, _ = weights(scores, scales, exponent, base_exponent, j)
            total += sums
            added = ()
            for w in tl.static_range(D // 32):
                # v holds, for each n, the words of row 2(4n + t) and of the next; tokens 2t.. are n = 2j, 2t + 8.. n = 2j + 1.
                r0 = v[(4 * j) * (D // 32) + w] ^ -2139062144
                r1 = v[(4 * j + 1) * (D // 32) + w] ^ -2139062144
                r2 = v[(4 * j + 2) * (D // 32) + w] ^ -2139062144
                r3 = v[(4 * j + 3) * (D // 32) + w] ^ -2139062144
                lower, upper = _value_operands(r0, r1, r2, r3)
                added = added + mma_fp16(lower, b0, b1, (acc[8 * w], acc[8 * w + 1], acc[8 * w + 2], acc[8 * w + 3]))
                added = added + mma_fp16(upper, b0, b1, (acc[8 * w + 4], acc[8 * w + 5], acc[8 * w + 6], acc[8 * w + 7]))
            acc = added
    total, _, even_inverse, odd_inverse = column_sums(total, t)
    target = out_ptr + 2 * t * columns * D + (D // 8) * g
    for i in tl.static_range(D // 32):
        # Rows g of MMA m are channel (D / 8) g + 2 m, rows g + 8 the next.
        even = acc[8 * i] * even_inverse, acc[8 * i + 2] * even_inverse, acc[8 * i + 4] * even_inverse, acc[8 * i + 6] * even_inverse
        odd = acc[8 * i + 1] * odd_inverse, acc[8 * i + 3] * odd_inverse, acc[8 * i + 5] * odd_inverse, acc[8 * i + 7] * odd_inverse
        store4(target + 4 * i, even[0], even[1], even[2], even[3], 2 * t < members)
        store4(target + columns * D + 4 * i, odd[0], odd[1], odd[2], odd[3], 2 * t + 1 < members)
    store_lse(lse_ptr, top, total, exponent, g, t, members, columns)
