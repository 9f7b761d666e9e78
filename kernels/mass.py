"""Attention mass: what the queries of a sampled forward gave to each cached token, summed over readers and GQA groups.

One launch after the forward, over all layers: it reads the keys again, with the final log-sum-exp that stage 1 of decode does not
know yet; a forward that is not sampled pays nothing. The host says which pages are read. Where `mass_records` can read the records, the
kernel here reads hot rows only. Specification: `attention_mass` over the
keys that `open` and `dequantise_rows` give (oscar_radix.attention.mass).
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.mass_records import mass_records
from oscar_radix.kernels.pages import BLOCK_ROWS, PAGE, PAGE_BLOCKS, key_operand, load_queries

TILE_PAGES = tl.constexpr(4)
SMALL_LEVEL = tl.constexpr(8)
"""Hot rows of the pages of a tile up to this level are read together, 4 x 8 rows; those of fuller pages page by page."""

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _operand(codes, low, masks, refined, plane: tl.constexpr, D: tl.constexpr, REFINED: tl.constexpr):
    """Operand of a K plane, transposed: fp16 [D / 4, n]; low: bytes of low bits in a refined layer, 0 in others."""
    operand = key_operand(codes, masks, plane, D)
    if REFINED:
        operand = operand * tl.where(refined, 4.0, 1.0).to(tl.float16) + ((low >> (2 * plane)) & 3).to(tl.float16)
    return tl.trans(operand)


@triton.jit
def _record_scores(
    k_codes, scales, k_low, record, low_record, keep, refined, masks, b0, b1, b2, b3, unit_b, offset, D: tl.constexpr, REFINED: tl.constexpr
):
    """Scores of M query rows against the records [n], in units of log 2: float32 [M, n]; rows outside `keep` are not read."""
    Q: tl.constexpr = D // 4
    codes = tl.load(k_codes + record[:, None] * Q + tl.arange(0, Q)[None, :], mask=keep[:, None], other=0)
    low = codes
    if REFINED:
        low = tl.load(k_low + low_record[:, None] * Q + tl.arange(0, Q)[None, :], mask=(keep & refined)[:, None], other=0)
    s = tl.dot(b0, _operand(codes, low, masks, refined, 0, D, REFINED))
    s = tl.dot(b1, _operand(codes, low, masks, refined, 1, D, REFINED), s)
    s = tl.dot(b2, _operand(codes, low, masks, refined, 2, D, REFINED), s)
    s = tl.dot(b3, _operand(codes, low, masks, refined, 3, D, REFINED), s)
    return (s * unit_b[:, None] - offset[:, None]) * tl.load(scales + record * 2, mask=keep, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _hot_scores(hot_k, hot_scales, at, keep, h0, h1, h2, h3, unit_h, D: tl.constexpr):
    """The same against hot rows `at` [n]."""
    Q: tl.constexpr = D // 4
    source = hot_k + at[:, None] * D + tl.arange(0, Q)[None, :]
    s = tl.dot(h0, tl.trans(tl.load(source, mask=keep[:, None], other=0).to(tl.float16)))
    s = tl.dot(h1, tl.trans(tl.load(source + Q, mask=keep[:, None], other=0).to(tl.float16)), s)
    s = tl.dot(h2, tl.trans(tl.load(source + 2 * Q, mask=keep[:, None], other=0).to(tl.float16)), s)
    s = tl.dot(h3, tl.trans(tl.load(source + 3 * Q, mask=keep[:, None], other=0).to(tl.float16)), s)
    return s * unit_h[:, None] * tl.load(hot_scales + at * 2, mask=keep, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _add(target, scores, lse, limit, position, keep):
    """Add the weights of M query rows, at most 1 each, to the n tokens at `position`."""
    counted = keep[None, :] & (position[None, :] < limit[:, None])
    weights = tl.where(counted, tl.minimum(tl.exp2(scores - lse[:, None]), 1.0), 0.0)
    tl.atomic_add(target, tl.sum(weights, 0), mask=keep, sem="relaxed")


@triton.jit
def _add_hot(
    entry, row, keep, entries, count, levels_ptr, table_ptr, first_block, first_slot, head, hot_k, hot_scales, row_numbers, mass_ptr,
    h0, h1, h2, h3, unit_h, lse, limit, Hkv: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Hot rows `row` [n] of the pages that are entries `entry` [n]."""
    page = tl.load(entries + entry, mask=keep, other=0).to(tl.int64)
    slot = tl.load(entries + count + entry, mask=keep, other=0).to(tl.int64)
    index = tl.load(entries + 2 * count + entry, mask=keep, other=0)
    level = tl.load(levels_ptr + page, mask=keep, other=0).to(tl.int32)
    keep = keep & (row < level)
    block = tl.load(table_ptr + page * PAGE_BLOCKS + row // BLOCK_ROWS, mask=keep, other=0)
    at = ((first_block + block) * Hkv + head) * BLOCK_ROWS + row % BLOCK_ROWS
    token = tl.where(level == PAGE, row, tl.load(row_numbers + at, mask=keep, other=0).to(tl.int32))
    position = index * PAGE + token
    scores = _hot_scores(hot_k, hot_scales, at, keep, h0, h1, h2, h3, unit_h, D)
    _add(mass_ptr + ((first_slot + slot) * Hkv + head) * PAGE + token, scores, lse, limit, position, keep)


@triton.jit(do_not_specialize=["record_pages", "hot_blocks", "slots", "count", "queries", "nearest"])
def _add_mass(
    query_ptr, lse_ptr, k_codes, scales, k_low, low_places, hot_k, hot_scales, row_masks, row_numbers, table_ptr, levels_ptr,
    key_step, key_zero, key_masks, lengths_ptr, entries, chunks, mass_ptr, visits_ptr,
    query_stride, lse_stride, record_pages, hot_blocks, slots, count, queries, nearest, softmax_scale,
    Hkv: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, M: tl.constexpr, RECORDS: tl.constexpr,
    REFINED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    chunk = chunks + tl.program_id(1)
    layer = tl.program_id(2).to(tl.int64)
    request = tl.load(chunk)
    first = tl.load(chunk + tl.num_programs(1))
    last = tl.load(chunk + 2 * tl.num_programs(1))
    # Row r is query r // GROUP of the request's last `queries`, head r % GROUP of the group (GROUP is G, rounded up to a power of two).
    query = tl.arange(0, M) // GROUP
    member = tl.arange(0, M) % GROUP
    rows = (request * queries + query) * (Hkv * G) + head * G + member
    row_ok = (query < queries) & (member < G)
    lse = tl.load(lse_ptr + layer * lse_stride + rows, mask=row_ok, other=float("inf"))
    row_ok = row_ok & (tl.abs(lse) < float("inf"))
    lse = tl.where(row_ok, lse * LOG2_E, 0.0)
    limit = tl.where(row_ok, tl.load(lengths_ptr + request).to(tl.int32) - queries + 1 + query - nearest, 0)
    end = tl.max(limit, 0)
    parameters = layer * (Hkv * D)
    key_step += parameters
    key_zero += parameters
    query_ptr += layer * query_stride
    if RECORDS:
        b0, b1, b2, b3, _, _, _, _, unit_b, _, offset = load_queries(query_ptr, rows, row_ok, key_step, key_zero, head, softmax_scale, D)
        masks = key_masks + parameters + head * D
        low_place = tl.load(low_places + layer).to(tl.int64) if REFINED else layer
        place = tl.arange(0, TILE_PAGES * PAGE)
        token = place % PAGE
        for tile in range(first, last, TILE_PAGES):
            entry = tile + place // PAGE
            page = tl.load(entries + entry, mask=entry < last, other=0).to(tl.int64)
            slot = tl.load(entries + count + entry, mask=entry < last, other=0).to(tl.int64)
            position = tl.load(entries + 2 * count + entry, mask=entry < last, other=0) * PAGE + token
            counted = (entry < last) & (position < end)
            hot = ((tl.load(row_masks + (layer * record_pages + page) * Hkv + head) >> token) & 1) != 0
            cold = counted & ~hot
            if tl.sum(cold.to(tl.int32), 0) > 0:
                record = ((layer * record_pages + page) * Hkv + head) * PAGE + token
                low_record = ((low_place * record_pages + page) * Hkv + head) * PAGE + token
                scores = _record_scores(
                    k_codes, scales, k_low, record, low_record, cold, low_place >= 0, masks, b0, b1, b2, b3, unit_b, offset, D, REFINED
                )
                _add(mass_ptr + ((layer * slots + slot) * Hkv + head) * PAGE + token, scores, lse, limit, position, cold)
            if (layer == 0) & (head == 0):
                seen = row_ok[:, None] & (member == 0)[:, None] & (position[None, :] < limit[:, None])
                tl.atomic_add(visits_ptr + slot * PAGE + token, tl.sum(seen.to(tl.float32), 0), mask=counted, sem="relaxed")
    # A second pass, so that only one kind of operands takes registers.
    _, _, _, _, h0, h1, h2, h3, _, unit_h, _ = load_queries(query_ptr, rows, row_ok, key_step, key_zero, head, softmax_scale, D)
    small = tl.arange(0, TILE_PAGES * SMALL_LEVEL)
    row = tl.arange(0, PAGE)
    for tile in range(first, last, TILE_PAGES):
        entry = tile + small // SMALL_LEVEL
        level = tl.load(levels_ptr + tl.load(entries + entry, mask=entry < last, other=0), mask=entry < last, other=0).to(tl.int32)
        few = level <= SMALL_LEVEL
        if tl.sum((few & (level > 0)).to(tl.int32), 0) > 0:
            _add_hot(
                entry, small % SMALL_LEVEL, few & (entry < last), entries, count, levels_ptr, table_ptr, layer * hot_blocks, layer * slots,
                head, hot_k, hot_scales, row_numbers, mass_ptr, h0, h1, h2, h3, unit_h, lse, limit, Hkv, D,
            )  # fmt: skip
        if tl.sum((~few).to(tl.int32), 0) > 0:
            for one in range(tile, tl.minimum(tile + TILE_PAGES, last)):
                if tl.load(levels_ptr + tl.load(entries + one)).to(tl.int32) > SMALL_LEVEL:
                    _add_hot(
                        one + row * 0, row, row < PAGE, entries, count, levels_ptr, table_ptr, layer * hot_blocks, layer * slots,
                        head, hot_k, hot_scales, row_numbers, mass_ptr, h0, h1, h2, h3, unit_h, lse, limit, Hkv, D,
                    )  # fmt: skip


def launch_options(height: int) -> dict[str, int]:
    """Warps and registers for M = `height` query rows; with 16 rows, 128 registers let four programs share a multiprocessor."""
    return {"num_warps": 4, "maxnreg": 128} if height == 16 else {"num_warps": 4 if height <= 64 else 8}


def add_mass(
    query: torch.Tensor,
    lse: torch.Tensor,
    cache: tuple[torch.Tensor, ...],
    tables: tuple[torch.Tensor, torch.Tensor],
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    watched: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mass: tuple[torch.Tensor, torch.Tensor],
    softmax_scale: float,
    nearest: int = 0,
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Add the mass of the last T queries of each of B sequences, over all layers; B and all layers' tensors are of the step itself.

    Args:
        query: float32 [L, B, T, Hq, D] in the key basis, layers any stride apart; query t stands at position length - T + t.
        lse: float32 [L, B, T, Hq], natural logarithm, final; of query heads that do not exist or do not count: inf.
        cache: k_codes uint8 [L, P, Hkv, 32, D/4], record scales fp16 [L, P, Hkv, 32, 2], hot k int8 [L, N, Hkv, 2, D], hot scales fp16
            [L, N, Hkv, 2, 2], row masks int32 [L, P, Hkv], row numbers uint8 [L, N, Hkv, 2]; contiguous.
        tables: block table int32 [P, 16], levels uint8 [P].
        key_parameters: key_step, key_zero float32 [L, Hkv, D]; key_masks uint8 [L, Hkv, 4, D/4]; contiguous.
        watched: tokens int64 [B] of each sequence; entries int32 [3, N] and chunks int32 [3, C] of
            `oscar_radix.attention.watched.WatchedPages`: which pages are read, and the slots that take their mass.
        mass: values float32 [L, S, Hkv, 32] and visits float32 [S, 32] (queries that could see the token), both added to.
        softmax_scale: multiplies the scores.
        nearest: the token of a query itself and the `nearest - 1` before it get nothing from it; 0 counts all.
        low: where there are refined layers, the low bits of their keys, uint8 [R, P, Hkv, 32, D/4], and their places among the R,
            int32 [L], -1 for the other layers.
    """
    layers, _, queries, query_heads, dim = query.shape
    kv_heads = key_parameters[0].shape[1]
    group = query_heads // kv_heads
    if not (query[0].is_contiguous() and lse[0].is_contiguous()):
        raise ValueError(f"queries and lse of a layer must be contiguous; their strides are {query.stride()} and {lse.stride()}")
    entries, chunks = watched[1:]
    rounded = triton.next_power_of_2(group)
    height = max(16, rounded * triton.next_power_of_2(queries))
    grid = (kv_heads, chunks.shape[1], layers)
    fast = queries == 1 and dim == 128 and group <= 8
    k_codes, scales, hot_k, _, row_masks, _ = cache
    k_low, low_places = low or (k_codes, entries)
    if fast:
        mass_records[grid](
            query, lse, k_codes, scales.view(torch.uint8), k_low, low_places, row_masks, *key_parameters, *watched, *mass, query.stride(0),
            lse.stride(0), k_codes.shape[1], mass[0].shape[1], entries.shape[1], nearest, softmax_scale, Hkv=kv_heads, G=group,
            REFINED=low is not None, num_warps=1,
        )  # fmt: skip
    _add_mass[grid](
        query, lse, k_codes, scales, k_low, low_places, *cache[2:], *tables, *key_parameters, *watched, *mass, query.stride(0),
        lse.stride(0), k_codes.shape[1], hot_k.shape[1], mass[0].shape[1], entries.shape[1], queries, nearest, softmax_scale, Hkv=kv_heads,
        G=group, GROUP=rounded, D=dim, M=height, RECORDS=not fast, REFINED=low is not None, **launch_options(height),
    )  # fmt: skip
