"""Extend attention on Hopper: two warpgroups open pages into shared memory, two compute.

A program holds 128 query rows: the heads of a GQA group for 128 / group tokens. One producer turns keys, the other values, from 2-bit
records, int8 rows or the chunk's own rows into fp16 tiles of 128 tokens, so that the cost is hidden and paid once for all rows. Each
consumer keeps 64 rows, and computes the scores of a tile while the values of the tile before are being added (FlashAttention-3,
arXiv 2407.08608, section 3.2). Queries carry the softmax scale and log2(e).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from oscar_radix.kernels.extend_consumer import CONSUMER_ROWS, load_queries, mask_scores, normalise, row_addresses, softmax_step
from oscar_radix.kernels.extend_producer import STAGES, TILE, produce


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
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    load_queries(query_ptr, q_tile, first, length, start, head, FIRST_ROW, Hkv, G, GROUP, D)
    prefix_tiles = (prefix + TILE - 1) // TILE
    token = first + (FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, S))) // GROUP
    lowest = first + FIRST_ROW // GROUP
    top = gl.full([CONSUMER_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([CONSUMER_ROWS], gl.float32, gl.SliceLayout(1, S))
    acc = gl.zeros([CONSUMER_ROWS, D], gl.float32, OUT)
    blank = gl.zeros([CONSUMER_ROWS, TILE], gl.float32, S)
    mbarrier.wait(k_full.index(0), 0)
    fence_async_shared()
    s = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), blank, use_acc=False)
    mbarrier.arrive(k_free.index(0), count=1)
    s = mask_scores(s, first_tile, prefix_tiles, prefix, lowest, token, S)
    top, factor, p, total = softmax_step(s, top, total, P)
    for tile in range(first_tile + 1, last_tile):
        turn = tile - first_tile
        stage = turn % STAGES
        before = (turn - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (turn // STAGES) & 1)
        mbarrier.wait(v_full.index(before), ((turn - 1) // STAGES) & 1)
        # Here and not in the producers, which would wait for their loads under way.
        fence_async_shared()
        s_next = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True)
        acc_next = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, [s_next])
        s = mask_scores(s, tile, prefix_tiles, prefix, lowest, token, S)
        top, factor, p_next, total = softmax_step(s, top, total, P)
        mbarrier.arrive(k_free.index(stage), count=1)
        # With the new weights among its operands, so that they are computed before it and not after.
        acc, p, p_next = warpgroup_mma_wait(0, [acc_next, p, p_next])
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        p = p_next
    turn = last_tile - 1 - first_tile
    mbarrier.wait(v_full.index(turn % STAGES), (turn // STAGES) & 1)
    fence_async_shared()
    acc = warpgroup_mma(p, v_tiles.index(turn % STAGES), acc)

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
    query_ptr, k_ptr, v_ptr, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr,
    key_step, key_zero, key_masks, mean_ptr, req_to_token, req_rows, prefix_lens, starts_ptr, lengths_ptr, block_request, block_first,
    out_ptr, lse_ptr, row_stride, splits, total_rows,
    Hkv: gl.constexpr, G: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PARTIAL: gl.constexpr, KEEP_LSE: gl.constexpr,
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
    constants = gl.allocate_shared_memory(gl.int32, [20, 1, D // 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
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
                    first_tile, last_tile, prefix, length, start, row, head, k_codes, scales, hot_k, hot_scales, row_masks, table_ptr,
                    key_step, key_zero, key_masks, k_ptr, constants, k_tiles, k_full, k_free, 0, Hkv, D,
                )),
                (produce, (
                    first_tile, last_tile, prefix, length, start, row, head, v_codes, scales, hot_v, hot_scales, row_masks, table_ptr,
                    key_step, key_zero, key_masks, v_ptr, constants, v_tiles, v_full, v_free, 1, Hkv, D,
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
