"""Extend attention: new tokens against cached pages, read in 2 bits and int8, and causally against their own chunk.

No bf16 copy of the prefix exists, and no memory grows with it: a program opens a tile of tokens at a time for 128 query rows, the
heads of a GQA group for 128 / group tokens. On Hopper `extend_hopper` does this with specialised warps; the kernel here runs
everywhere else and is the same computation. Small chunks on long prefixes are split over the keys; the parts merge by log-sum-exp.
Specification: `attend` over the rows that `open` and `dequantise_rows` give (oscar_radix.attention.backend).
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.capability import compute_capability
from oscar_radix.kernels.extend_hopper import extend_hopper
from oscar_radix.kernels.extend_producer import TILE as HOPPER_TILE
from oscar_radix.kernels.operands import halves, int8_rows, pair, record_keys, record_values, twice
from oscar_radix.kernels.pages import BLOCK_ROWS, PAGE, PAGE_BLOCKS, softmax_step

ROWS = 128
"""Query rows of a program."""

TILE = tl.constexpr(64)
"""Tokens of a tile of the portable kernel."""

LARGEST_SPLIT = 16
MIN_PART_TILES = 4


def block_tokens(group: int) -> int:
    """Query tokens of a program, for `group` query heads a KV head (at most 128)."""
    return ROWS // triton.next_power_of_2(group)


def extend_splits(prefixes: list[int], lengths: list[int], kv_heads: int, group: int, multiprocessors: int) -> int:
    """Parts of the keys that make the programs of a prefill batch (one a multiprocessor at a time) fill the GPU best.

    With n programs and s parts the time is ceil(n s / multiprocessors) / s waves; the fewest parts within 5 % of the least time,
    each of at least MIN_PART_TILES tiles of the longest sequence.

    Args:
        prefixes, lengths: cached and new tokens of each sequence.
    """
    programs = kv_heads * sum(-(-length // block_tokens(group)) for length in lengths)
    tiles = max(-(-(prefix + length) // HOPPER_TILE.value) for prefix, length in zip(prefixes, lengths, strict=True))
    most = max(1, min(LARGEST_SPLIT, tiles // MIN_PART_TILES))
    waves = {s: -(-programs * s // multiprocessors) / s for s in range(1, most + 1)}
    return next(s for s, time in waves.items() if time <= 1.05 * min(waves.values()))


@triton.jit
def _set_bits(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24) & 63


@triton.jit
def _key_constants(key_step, key_zero, key_masks, head, plane: tl.constexpr, D: tl.constexpr):
    """Mask, steps and shifts of one K plane (see `operands.key_plane`), [1, D / 16] each."""
    at = head * D + plane * (D // 4) + tl.arange(0, D // 16) * 4
    mask = tl.load((key_masks + at).to(tl.pointer_type(tl.int32))) << (2 * plane)
    s0 = tl.load(key_step + at)
    s1 = tl.load(key_step + at + 1)
    s2 = tl.load(key_step + at + 2)
    s3 = tl.load(key_step + at + 3)
    low = pair(-s0 * tl.load(key_zero + at), -s1 * tl.load(key_zero + at + 1))
    high = pair(-s2 * tl.load(key_zero + at + 2), -s3 * tl.load(key_zero + at + 3))
    s0 = pair(s0 * 0.25**plane, s1 * 0.25**plane)
    s2 = pair(s2 * 0.25**plane, s3 * 0.25**plane)
    return mask[None, :], s0[None, :], s2[None, :], low[None, :], high[None, :]


@triton.jit
def _hot_rows(opened, hot, at, rows_ptr, scales_ptr, D: tl.constexpr, WHICH: tl.constexpr):
    """Opened rows, pairs [TILE, D / 2], with the hot tokens' int8 rows in their places."""
    rows = tl.load(rows_ptr + at[:, None] * (D // 4) + tl.arange(0, D // 4)[None, :], mask=hot[:, None], other=0)
    scale = tl.load(scales_ptr + at * 2 + WHICH, mask=hot, other=0.0)
    return tl.where(hot[:, None], int8_rows(rows, twice(scale)[:, None]), opened)


@triton.jit
def _attend_tile(s, valid, values, top, total, acc):
    """Add one tile with scores s [M, TILE]."""
    top, factor, weights, total = softmax_step(tl.where(valid, s, float("-inf")), top, total)
    return top, total, tl.dot(weights.to(tl.float16), values, acc * factor[:, None])


@triton.jit(do_not_specialize=["row_stride", "splits", "total_rows"])
def _extend(
    query_ptr, k_ptr, v_ptr, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr,
    key_step, key_zero, key_masks, mean_ptr, req_to_token, req_rows, prefix_lens, starts_ptr, lengths_ptr, block_request, block_first,
    out_ptr, lse_ptr, row_stride, splits, total_rows,
    Hkv: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PARTIAL: tl.constexpr, KEEP_LSE: tl.constexpr,
    M: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0)
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    split = tl.program_id(2)
    request = tl.load(block_request + block)
    first = tl.load(block_first + block)
    start = tl.load(starts_ptr + request)
    length = tl.load(lengths_ptr + request).to(tl.int32)
    prefix = tl.load(prefix_lens + request).to(tl.int32)
    row = req_to_token + tl.load(req_rows + request).to(tl.int64) * row_stride
    # Row r is token r // GROUP, query head r % GROUP of the group (GROUP is G, rounded up to a power of two).
    member = tl.arange(0, M) % GROUP
    position = first + tl.arange(0, M) // GROUP
    row_ok = (position < length) & (member < G)
    at_row = (start + position).to(tl.int64) * (Hkv * G) + head * G + member
    channel = tl.arange(0, D)
    query = tl.load(query_ptr + at_row[:, None] * D + channel[None, :], mask=row_ok[:, None], other=0.0)
    c0 = _key_constants(key_step, key_zero, key_masks, head, 0, D)
    c1 = _key_constants(key_step, key_zero, key_masks, head, 1, D)
    c2 = _key_constants(key_step, key_zero, key_masks, head, 2, D)
    c3 = _key_constants(key_step, key_zero, key_masks, head, 3, D)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    token = tl.arange(0, TILE)
    prefix_tiles = (prefix + TILE - 1) // TILE
    tiles = prefix_tiles + (tl.minimum(first + M // GROUP, length) + TILE - 1) // TILE
    first_tile = split * tiles // splits
    last_tile = (split + 1) * tiles // splits
    for tile in range(first_tile, tl.minimum(last_tile, prefix_tiles)):
        at = tile * TILE + token
        valid = at < prefix
        page = (tl.load(row + at // PAGE * PAGE, mask=valid, other=0) // PAGE).to(tl.int64)
        record = (page * Hkv + head) * PAGE + at % PAGE
        word = tl.arange(0, D // 16)
        codes = tl.load(k_codes + record[:, None] * (D // 16) + word[None, :])
        words = tl.load(v_codes + record[:, None] * (D // 16) + word[None, :])
        k_scale = tl.load(scales + record * 2, mask=valid, other=0.0)
        v_scale = tl.load(scales + record * 2 + 1, mask=valid, other=0.0)
        keys = record_keys(codes, c0 + c1 + c2 + c3, twice(k_scale)[:, None])
        values = record_values(words, twice(v_scale)[:, None])
        # Row j of a page's hot rows is its j-th hot token.
        mask = tl.load(row_masks + page * Hkv + head)
        hot = (((mask >> (at % PAGE)) & 1) != 0) & valid
        if tl.sum(hot.to(tl.int32), 0) > 0:
            index = _set_bits(mask & ((1 << (at % PAGE)) - 1))
            block_number = tl.load(table_ptr + page * PAGE_BLOCKS + index // BLOCK_ROWS, mask=hot, other=0).to(tl.int64)
            hot_at = (block_number * Hkv + head) * BLOCK_ROWS + index % BLOCK_ROWS
            keys = _hot_rows(keys, hot, hot_at, hot_k, hot_scales, D, 0)
            values = _hot_rows(values, hot, hot_at, hot_v, hot_scales, D, 1)
        top, total, acc = _attend_tile(tl.dot(query, tl.trans(halves(keys))), valid[None, :], halves(values), top, total, acc)
    for tile in range(tl.maximum(first_tile, prefix_tiles), last_tile):
        at = (tile - prefix_tiles) * TILE + token
        own = ((start + at).to(tl.int64) * Hkv + head)[:, None] * D + channel[None, :]
        keys = tl.load(k_ptr + own, mask=(at < length)[:, None], other=0.0)
        values = tl.load(v_ptr + own, mask=(at < length)[:, None], other=0.0)
        top, total, acc = _attend_tile(tl.dot(query, tl.trans(keys)), at[None, :] <= position[:, None], values, top, total, acc)
    out = acc * (1.0 / tl.where(total > 0, total, 1.0))[:, None]
    lse = top + tl.log2(total)
    if PARTIAL:
        at_row += split.to(tl.int64) * total_rows
        tl.store(lse_ptr + at_row, lse, mask=row_ok)
    else:
        out += tl.load(mean_ptr + head * D + channel)[None, :]
        if KEEP_LSE:
            tl.store(lse_ptr + at_row, lse * 0.6931471805599453, mask=row_ok)
    tl.store(out_ptr + at_row[:, None] * D + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=row_ok[:, None])


@triton.jit(do_not_specialize=["splits", "total_rows"])
def _merge_parts(
    partial_ptr, lse_ptr, mean_ptr, out_ptr, final_lse_ptr, splits, total_rows,
    Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, KEEP_LSE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query row; still in the value basis, V's mean added."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, D)
    part = tl.arange(0, S)
    lse = tl.load(lse_ptr + part * total_rows + row, mask=part < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - top)
    total = tl.sum(weights, 0)
    at = (part.to(tl.int64) * total_rows + row)[:, None] * D + channel[None, :]
    # An empty part wrote no output: its weight is 0 and it is not read.
    parts = tl.load(partial_ptr + at, mask=((part < splits) & (weights > 0))[:, None], other=0.0)
    out = tl.sum(parts * (weights / total)[:, None], 0) + tl.load(mean_ptr + (row % Hq) // G * D + channel)
    tl.store(out_ptr + row * D + channel, out.to(out_ptr.dtype.element_ty))
    if KEEP_LSE:
        tl.store(final_lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453)


def extend(
    query: torch.Tensor,
    own: tuple[torch.Tensor, torch.Tensor],
    layer_cache: tuple[torch.Tensor, ...],
    block_table: torch.Tensor,
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    value_mean: torch.Tensor,
    sequences: tuple[torch.Tensor, ...],
    blocks: tuple[torch.Tensor, torch.Tensor],
    splits: int,
    out: torch.Tensor,
    final_lse: torch.Tensor | None = None,
) -> None:
    """Attention of the new tokens of a prefill batch to the cached tokens before them and, causally, to each other.

    Args:
        query: fp16 [T, Hq, D] in the key basis, times the softmax scale and log2(e), sequence after sequence.
        own: keys and values of the new tokens in their bases, fp16 [T, Hkv, D], contiguous.
        layer_cache: k_codes, v_codes uint8 [P, Hkv, 32, D/4], scales fp16 [P, Hkv, 32, 2]; hot k, v int8 [N, Hkv, 2, D],
            hot scales fp16 [N, Hkv, 2, 2]; row masks int32 [P, Hkv], bit i: token i is hot. All contiguous, of one layer.
        block_table: int32 [P, 16].
        key_parameters: key_step, key_zero float32 [Hkv, D]; key_masks uint8 [Hkv, 4, D/4].
        value_mean: V's mean in the value basis, float32 [Hkv, D]; it is added to the output.
        sequences: req_to_token int32 [R, C]; rows of it int [B], prefix lengths int [B], first tokens in the batch int [B],
            numbers of new tokens int [B].
        blocks: request and first position (relative to the prefix) of each block of `block_tokens(G)` query tokens, int32.
        splits: parts of the keys, see `extend_splits`.
        out: [T, Hq, D] in the value basis, any float dtype; written.
        final_lse: float32 [T, Hq], natural logarithm, of scores in the key basis; written where it is given.
    """
    tokens, query_heads, dim = query.shape
    kv_heads = own[0].shape[1]
    group = query_heads // kv_heads
    rows = tokens * query_heads
    k_codes, v_codes, scales, hot_k, hot_v, *rest = layer_cache
    words = (k_codes.view(torch.int32), v_codes.view(torch.int32), scales, hot_k.view(torch.int32), hot_v.view(torch.int32))
    req_to_token, *where = sequences
    keep = final_lse is not None
    kept = final_lse if keep else value_mean
    target, lse = out, kept
    if splits > 1:
        target = torch.empty(splits, tokens, query_heads, dim, dtype=torch.float32, device=out.device)
        lse = torch.empty(splits, tokens, query_heads, dtype=torch.float32, device=out.device)
    arguments = (
        query, *own, *words, *rest, block_table, *key_parameters, value_mean, req_to_token, *where, *blocks,
        target, lse, req_to_token.stride(0), splits, rows,
    )  # fmt: skip
    constants = {"Hkv": kv_heads, "G": group, "GROUP": triton.next_power_of_2(group), "D": dim, "PARTIAL": splits > 1}
    constants["KEEP_LSE"] = keep and splits == 1
    grid = (kv_heads, len(blocks[0]), splits)
    if compute_capability(query) == 9:
        extend_hopper[grid](*arguments, **constants, num_warps=4)
    else:
        _extend[grid](*arguments, **constants, M=ROWS, num_warps=8, num_stages=1)
    if splits > 1:
        _merge_parts[(rows,)](
            target,
            lse,
            value_mean,
            out,
            kept,
            splits,
            rows,
            Hq=query_heads,
            G=group,
            D=dim,
            S=triton.next_power_of_2(splits),
            KEEP_LSE=keep,
            num_warps=1,
        )
