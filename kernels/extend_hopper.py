"""Extend attention on Hopper: two warpgroups open pages into shared memory, two compute.

A program holds 128 query rows: the heads of a GQA group for 128 / group tokens. One producer turns keys, the other values, from 2-bit
records, int8 rows or the chunk's own rows into fp16 tiles of 128 tokens, so that the cost is hidden and paid once for all rows. Each
consumer keeps 64 rows. Queries carry the softmax scale and log2(e).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from oscar_radix.kernels.extend_consumer import (
    CONSUMER_ROWS,
    STAGES,
    TILE,
    attend_tiles,
    load_queries,
    normalise,
    row_addresses,
    tile_barriers,
)
from oscar_radix.kernels.extend_producer import produce


@gluon.jit
def _consume(
    first_tile, last_tile, prefix, length, start, first, head, split, total_rows, query_ptr, mean_ptr, out_ptr, lse_ptr,
    k_tiles, v_tiles, q_tile, k_full, v_full, k_free, v_free,
    FIRST_ROW: gl.constexpr, Hkv: gl.constexpr, G: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PARTIAL: gl.constexpr,
    KEEP_LSE: gl.constexpr,
):  # fmt: skip
    """64 query rows, from FIRST_ROW of the program's 128."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    load_queries(query_ptr, q_tile, first, length, start, head, FIRST_ROW, Hkv, G, GROUP, D)
    prefix_tiles = (prefix + TILE - 1) // TILE
    token = first + (FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, S))) // GROUP
    lowest = first + FIRST_ROW // GROUP
    top = gl.full([CONSUMER_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([CONSUMER_ROWS], gl.float32, gl.SliceLayout(1, S))
    acc = gl.zeros([CONSUMER_ROWS, D], gl.float32, OUT)
    top, total, acc = attend_tiles(
        first_tile, last_tile, prefix_tiles, prefix, lowest, token, top, total, acc, q_tile, k_tiles, v_tiles, None,
        k_full, v_full, k_free, v_free, S, OUT, False,
    )  # fmt: skip
    row = FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, OUT))
    at, inside = row_addresses(row, first, length, start, head, Hkv, G, GROUP)
    channel = gl.arange(0, D, gl.SliceLayout(0, OUT))
    out, lse = normalise(acc, top, total, OUT)
    if PARTIAL:
        at += split.to(gl.int64) * total_rows
        gl.store(lse_ptr + at, lse, mask=inside)
    else:
        out += gl.load(mean_ptr + head * D + channel)[None, :]
        if KEEP_LSE:
            gl.store(lse_ptr + at, lse * 0.6931471805599453, mask=inside)
    gl.store(out_ptr + at[:, None] * D + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@gluon.jit(do_not_specialize=["row_stride", "splits", "total_rows"])
def extend_hopper(
    query_ptr, k_ptr, v_ptr, k_codes, v_codes, scales, k_low, v_low, hot_k, hot_v, hot_scales, row_masks, table_ptr,
    key_step, key_zero, key_masks, mean_ptr, req_to_token, req_rows, prefix_lens, starts_ptr, lengths_ptr, block_request, block_first,
    out_ptr, lse_ptr, row_stride, splits, total_rows,
    Hkv: gl.constexpr, G: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PARTIAL: gl.constexpr, KEEP_LSE: gl.constexpr,
    REFINED: gl.constexpr,
):  # fmt: skip
    head = gl.program_id(0)
    # Later blocks read more of their own chunk: the longest first.
    block = gl.num_programs(1) - 1 - gl.program_id(1)
    split = gl.program_id(2)
    request = gl.load(block_request + block)
    first = gl.load(block_first + block)
    start = gl.load(starts_ptr + request).to(gl.int32)
    length = gl.load(lengths_ptr + request).to(gl.int32)
    prefix = gl.load(prefix_lens + request).to(gl.int32)
    row = req_to_token + gl.load(req_rows + request).to(gl.int64) * row_stride
    last_token = gl.minimum(first + 2 * CONSUMER_ROWS // GROUP, length)
    tiles = (prefix + TILE - 1) // TILE + (last_token + TILE - 1) // TILE
    first_tile = split * tiles // splits
    last_tile = (split + 1) * tiles // splits

    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, TILE, D], SWIZZLED)
    v_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, TILE, D], SWIZZLED)
    q_tiles = gl.allocate_shared_memory(gl.float16, [2, CONSUMER_ROWS, D], SWIZZLED)
    constants = gl.allocate_shared_memory(gl.int32, [28 if REFINED else 20, 1, D // 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    k_full, v_full, k_free, v_free = tile_barriers()
    if last_tile > first_tile:
        # A consumer needs 192 registers; with fewer, ptxas makes every tensor-core instruction wait for the one before.
        gl.warp_specialize(
            [
                (_consume, (
                    first_tile, last_tile, prefix, length, start, first, head, split, total_rows, query_ptr, mean_ptr, out_ptr, lse_ptr,
                    k_tiles, v_tiles, q_tiles.index(0), k_full, v_full, k_free, v_free, 0, Hkv, G, GROUP, D, PARTIAL, KEEP_LSE,
                )),
                (_consume, (
                    first_tile, last_tile, prefix, length, start, first, head, split, total_rows, query_ptr, mean_ptr, out_ptr, lse_ptr,
                    k_tiles, v_tiles, q_tiles.index(1), k_full, v_full, k_free, v_free, CONSUMER_ROWS, Hkv, G, GROUP, D, PARTIAL, KEEP_LSE,
                )),
                (produce, (
                    first_tile, last_tile, prefix, length, start, row, head, k_codes, scales, k_low, hot_k, hot_scales, row_masks,
                    table_ptr, key_step, key_zero, key_masks, k_ptr, constants, k_tiles, k_full, k_free, 0, Hkv, D, REFINED,
                )),
                (produce, (
                    first_tile, last_tile, prefix, length, start, row, head, v_codes, scales, v_low, hot_v, hot_scales, row_masks,
                    table_ptr, key_step, key_zero, key_masks, v_ptr, constants, v_tiles, v_full, v_free, 1, Hkv, D, REFINED,
                )),
            ],
            [4, 4, 4], [192, 64, 64],
        )  # fmt: skip
    elif PARTIAL:
        # Fewer tiles than parts.
        r = gl.arange(0, 2 * CONSUMER_ROWS, gl.BlockedLayout([1], [32], [4], [0]))
        at, inside = row_addresses(r, first, length, start, head, Hkv, G, GROUP)
        at += split.to(gl.int64) * total_rows
        empty = gl.full([2 * CONSUMER_ROWS], float("-inf"), gl.float32, gl.BlockedLayout([1], [32], [4], [0]))
        gl.store(lse_ptr + at, empty, mask=inside)
