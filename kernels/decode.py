"""Decode attention over a mixed-precision cache: one stage 1 over records and hot rows, split over the keys, then a combine.

Stage 1 is one launch of one-warp programs that fill the GPU exactly once. Of the programs of a sequence and head some read its
records, the others its hot rows, in proportion to the bytes; the host need not know how many rows are hot, so a CUDA graph replays.
Specification: `attend` over the rows that `open` and `dequantise_rows` give (oscar_radix.attention.backend).
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.capability import compute_capability
from oscar_radix.kernels.decode_hot import hot_tiles, read_hot
from oscar_radix.kernels.decode_records import read_records
from oscar_radix.kernels.pages import PAGE

HOT_LEVELS = tl.constexpr((32, 8, 4, 2))
"""Levels in the order of the list of hot pages."""

HOT_TILE_COST = tl.constexpr(4)
"""A tile of 32 int8 rows reads about four times the bytes of a page's record."""

PROGRAM_TILES = tl.constexpr(3)
"""Pages that a program reads at least, before another one helps."""

PASS_HEADS = tl.constexpr(8)
"""Query heads of a program."""

MULTIPROCESSOR_PROGRAMS = 16
"""One-warp programs of 128 registers that a multiprocessor holds."""

LARGEST_SPLIT = 256

COMBINE_TILE = 8192
"""Partial outputs that a program of the combine loads at once: 64 registers a thread."""


@triton.jit
def _share(pages, records, tiles, splits):
    """Programs that read records, and programs in all, of a sequence with `records` pages below level 32 and `tiles` of hot rows."""
    cost = records + HOT_TILE_COST * tiles
    used = tl.minimum(splits, tl.maximum((cost + PROGRAM_TILES - 1) // PROGRAM_TILES, 1))
    both = (records > 0) & (tiles > 0)
    used = tl.where(both, tl.maximum(used, 2), used)
    hot = (2 * used * HOT_TILE_COST * tiles + cost) // (2 * tl.maximum(cost, 1))
    hot = tl.where(both, tl.minimum(tl.maximum(hot, 1), used - 1), tl.where(tiles > 0, used, 0))
    return used - hot, used


@triton.jit(do_not_specialize=["row_stride", "list_stride", "splits"])
def _stage1(
    query_ptr, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_step, key_zero, key_masks,
    req_to_token, req_rows, seq_lens, list_ptr, count_ptr, out_ptr, lse_ptr, row_stride, list_stride, softmax_scale, splits,
    Hkv: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PASSES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0) // PASSES
    member = tl.program_id(0) % PASSES * PASS_HEADS
    split = tl.program_id(1)
    request = tl.program_id(2)
    members = tl.minimum(G - member, PASS_HEADS)
    tokens = tl.load(seq_lens + request).to(tl.int32)
    pages = (tokens + PAGE - 1) // PAGE
    counts, ends = hot_tiles(count_ptr + request * 4)
    tiles = ends[3]
    readers, used = _share(pages, pages - counts[0], tiles, splits)
    pages_ptr = req_to_token + tl.load(req_rows + request).to(tl.int64) * row_stride
    row = (request * Hkv + head) * G + member
    query = query_ptr + row * D
    out = out_ptr + (row * splits + split) * D
    lse = lse_ptr + row * splits + split
    if split < readers:
        read_records(
            query, k_codes, v_codes, scales, row_masks, key_step, key_zero, key_masks, pages_ptr, tokens,
            split * pages // readers, (split + 1) * pages // readers, head, out, lse, splits, members, softmax_scale, Hkv, D,
        )  # fmt: skip
    elif split < used:
        part = split - readers
        parts = used - readers
        read_hot(
            query, hot_k, hot_v, hot_scales, table_ptr, pages_ptr, list_ptr + request * list_stride, counts, ends, tokens,
            part * tiles // parts, (part + 1) * tiles // parts, head, out, lse, splits, members, softmax_scale, Hkv, D,
        )  # fmt: skip
    else:
        g = tl.arange(0, 32)
        tl.store(lse + g * splits, tl.full([32], float("-inf"), tl.float32), mask=g < members)
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["splits"])
def _combine(
    partial_ptr, lse_ptr, rotation_ptr, mean_ptr, out_ptr, final_lse_ptr, splits,
    G: tl.constexpr, Hq: tl.constexpr, D: tl.constexpr, S: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr,
    ROTATE: tl.constexpr, KEEP_LSE: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Merge the splits of C channels of one query head, and leave the value basis: out = o R^T + mu; ROTATE needs all channels."""
    row = tl.program_id(0)
    head = (row % Hq) // G
    channel = tl.program_id(1) * C + tl.arange(0, C)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    every = tl.arange(0, S)
    lse = tl.load(lse_ptr + row * splits + every, mask=every < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    total = tl.sum(tl.exp2(lse - top), 0)
    if KEEP_LSE:
        tl.store(final_lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453)
    merged = tl.zeros([C], tl.float32)
    for start in range(0, splits, CHUNK):
        split = start + tl.arange(0, CHUNK)
        weight = tl.exp2(tl.load(lse_ptr + row * splits + split, mask=split < splits, other=float("-inf")) - top)
        # An empty split wrote no output: its weight is 0 and it is not read.
        parts = tl.load(partial_ptr + (row * splits + split)[:, None] * D + channel[None, :], mask=(weight > 0)[:, None], other=0.0)
        merged += tl.sum(parts * weight[:, None], 0)
    out = merged / total
    if ROTATE:
        # rotation[e, c]: o R^T needs sum_c o_c R[e, c] for every model channel e.
        rotation = tl.load(rotation_ptr + head * D * D + channel[:, None] * D + channel[None, :])
        out = tl.sum(rotation * out[None, :], 1)
    out += tl.load(mean_ptr + head * D + channel)
    tl.store(out_ptr + row * D + channel, out.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["row_stride", "list_stride"])
def _list_hot_pages(req_to_token, req_rows, seq_lens, levels_ptr, list_ptr, count_ptr, row_stride, list_stride, CHUNK: tl.constexpr):
    """Indices of a request's pages that hold hot rows, those of one level together and in order, and their numbers."""
    request = tl.program_id(0)
    pages = (tl.load(seq_lens + request).to(tl.int32) + PAGE - 1) // PAGE
    row = tl.load(req_rows + request).to(tl.int64) * row_stride
    listed = 0
    for which in tl.static_range(4):
        before = listed
        for start in range(0, pages, CHUNK):
            index = start + tl.arange(0, CHUNK)
            page = tl.load(req_to_token + row + index * PAGE, mask=index < pages, other=0) // PAGE
            wanted = (tl.load(levels_ptr + page).to(tl.int32) == HOT_LEVELS[which]) & (index < pages)
            place = listed + tl.cumsum(wanted.to(tl.int32), 0) - 1
            tl.store(list_ptr + request * list_stride + place, index, mask=wanted)
            listed += tl.sum(wanted.to(tl.int32), 0)
        tl.store(count_ptr + request * 4 + which, listed - before)


def list_hot_pages(
    sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor], levels: torch.Tensor, hot: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """Once a step: which pages of each request hold hot rows.

    Args:
        sequences: req_to_token int32 [R, C], rows of it int [B], tokens int [B].
        levels: uint8 [P].
        hot: page indices int32 [B, N], those of levels 32, 8, 4, 2 one after the other, and their numbers int32 [B, 4]; written.
    """
    req_to_token, rows, lengths = sequences
    pages, counts = hot
    _list_hot_pages[(len(rows),)](
        req_to_token, rows, lengths, levels, pages, counts, req_to_token.stride(0), pages.stride(0), CHUNK=1024, num_warps=4
    )


def decode_splits(batch: int, kv_heads: int, group: int, multiprocessors: int) -> int:
    """Programs of each sequence and head, so that all of them fill the GPU once; at least one for records and one for hot rows."""
    programs = MULTIPROCESSOR_PROGRAMS * multiprocessors
    return max(2, min(LARGEST_SPLIT, programs // (batch * kv_heads * triton.cdiv(group, PASS_HEADS.value))))


def decode(
    query: torch.Tensor,
    layer_cache: tuple[torch.Tensor, ...],
    block_table: torch.Tensor,
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    value_parameters: tuple[torch.Tensor, torch.Tensor],
    sequences: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    hot: tuple[torch.Tensor, torch.Tensor],
    workspace: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    softmax_scale: float,
    rotate_values: bool = True,
    final_lse: torch.Tensor | None = None,
) -> None:
    """Attention of one new token a request over its cached tokens, that token included.

    Args:
        query: float32 [B, Hq, D], in the key basis; D is 64 or 128.
        layer_cache: k_codes, v_codes uint8 [P, Hkv, 32, D/4], scales fp16 [P, Hkv, 32, 2]; hot k, v int8 [N, Hkv, 2, D],
            hot scales fp16 [N, Hkv, 2, 2]; row masks int32 [P, Hkv], bit i: token i is hot. All contiguous, of one layer.
        block_table: int32 [P, 16].
        key_parameters: key_step, key_zero float32 [Hkv, D]; key_masks uint8 [Hkv, 4, D/4].
        value_parameters: value_rotation float32 [Hkv, D, D], value_mean float32 [Hkv, D].
        sequences: req_to_token int32 [R, C], rows of it int [B], tokens int [B].
        hot: of `list_hot_pages`.
        workspace: partial outputs float32 [B, Hq, S, D], their log-sum-exp float32 [B, Hq, S]; S is `decode_splits`.
        out: [B, Hq, D], any float dtype; written.
        softmax_scale: multiplies the scores.
        rotate_values: False where the output projection takes rotated values (`Codec.values_folded`): the mean alone is added.
        final_lse: float32 [B, Hq], natural logarithm, of scores in the key basis; written where it is given.
    """
    batch, query_heads, dim = query.shape
    if dim not in (64, 128):
        raise ValueError(f"decode kernels exist for head dims 64 and 128, not {dim}")
    kv_heads = key_parameters[0].shape[0]
    group = query_heads // kv_heads
    req_to_token, rows, lengths = sequences
    partial, lse = workspace
    splits = lse.shape[2]
    k_codes, v_codes, scales, *rest = layer_cache
    passes = triton.cdiv(group, PASS_HEADS.value)
    overlap = compute_capability(query) >= 9
    _stage1[(kv_heads * passes, splits, batch)](
        query, k_codes, v_codes, scales.view(torch.uint8), *rest, block_table, *key_parameters, req_to_token, rows, lengths, *hot,
        partial, lse, req_to_token.stride(0), hot[0].stride(0), softmax_scale, splits, Hkv=kv_heads, G=group, D=dim, PASSES=passes,
        OVERLAP=overlap, num_warps=1, maxnreg=128, launch_pdl=overlap,
    )  # fmt: skip
    # Few rows: several programs each, while nothing needs all channels at once.
    channels = dim if rotate_values or batch * query_heads >= 200 else 32
    width = triton.next_power_of_2(splits)
    _combine[(batch * query_heads, dim // channels)](
        partial, lse, *value_parameters, out, lse if final_lse is None else final_lse, splits, G=group, Hq=query_heads, D=dim,
        S=width, CHUNK=min(width, COMBINE_TILE // channels), C=channels, ROTATE=rotate_values,
        KEEP_LSE=final_lse is not None, OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
    )  # fmt: skip
