"""Extend attention on Hopper over fp16 rows: a round of the opened prefix, then the chunk itself.

The copy engine brings tiles of keys and values; two warpgroups compute, each with 64 query rows. Between rounds a row's accumulator,
maximum and total wait in memory, in float32. Small chunks are split over the tiles of a round, each part with rows of its own to wait in.
"""

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

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
from oscar_radix.kernels.extend_parts import merge_parts
from oscar_radix.kernels.extend_plan import ExtendPlan
from oscar_radix.kernels.open_rows import open_prefix


@gluon.jit
def _produce(
    k_rows, v_rows, first_tile, last_tile, prefix_tiles, scratch_row, own_row, column, k_tiles, v_tiles, k_full, v_full, k_free, v_free
):
    for tile in range(first_tile, last_tile):
        turn = tile - first_tile
        stage = turn % STAGES
        phase = ((turn // STAGES) & 1) ^ 1
        row = gl.where(tile < prefix_tiles, scratch_row + tile * TILE, own_row + (tile - prefix_tiles) * TILE)
        mbarrier.wait(k_free.index(stage), phase)
        mbarrier.expect(k_full.index(stage), k_rows.block_type.nbytes)
        tma.async_copy_global_to_shared(k_rows, [row, column], k_full.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_free.index(stage), phase)
        mbarrier.expect(v_full.index(stage), v_rows.block_type.nbytes)
        tma.async_copy_global_to_shared(v_rows, [row, column], v_full.index(stage), v_tiles.index(stage))


@gluon.jit
def _consume(
    first_tile, last_tile, prefix_tiles, prefix, empty, carried, last, length, start, first, head, part_rows, all_rows, query_ptr,
    mean_ptr, out_ptr, lse_ptr, acc_ptr, state_ptr, k_tiles, v_tiles, q_tile, order, k_full, v_full, k_free, v_free,
    FIRST_ROW: gl.constexpr, Hkv: gl.constexpr, G: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PARTIAL: gl.constexpr,
    KEEP_LSE: gl.constexpr,
):  # fmt: skip
    """64 query rows, from FIRST_ROW of the program's 128."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    load_queries(query_ptr, q_tile, first, length, start, head, FIRST_ROW, Hkv, G, GROUP, D)
    r = FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, S))
    # A part without tiles takes one that none of its rows sees.
    token = gl.where(empty, -1, first + r // GROUP)
    lowest = gl.where(empty, -1, first + FIRST_ROW // GROUP)
    top = gl.full([CONSUMER_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([CONSUMER_ROWS], gl.float32, gl.SliceLayout(1, S))
    acc = gl.zeros([CONSUMER_ROWS, D], gl.float32, OUT)
    channel = gl.arange(0, D, gl.SliceLayout(0, OUT))
    if carried:
        row_at, there = row_addresses(r, first, length, start, head, Hkv, G, GROUP)
        top = gl.load(state_ptr + part_rows + row_at, mask=there, other=0.0)
        total = gl.load(state_ptr + all_rows + part_rows + row_at, mask=there, other=0.0)
        row = FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, OUT))
        at, inside = row_addresses(row, first, length, start, head, Hkv, G, GROUP)
        acc = gl.load(acc_ptr + (part_rows + at)[:, None] * D + channel[None, :], mask=inside[:, None], other=0.0)
    top, total, acc = attend_tiles(
        first_tile, last_tile, prefix_tiles, prefix, lowest, token, top, total, acc, q_tile, k_tiles, v_tiles, order,
        k_full, v_full, k_free, v_free, S, OUT, True,
    )  # fmt: skip
    row = FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, OUT))
    at, inside = row_addresses(row, first, length, start, head, Hkv, G, GROUP)
    if last:
        out, lse = normalise(acc, top, total, OUT)
        if PARTIAL:
            at += part_rows
            gl.store(lse_ptr + at, lse, mask=inside)
        else:
            out += gl.load(mean_ptr + head * D + channel)[None, :]
            if KEEP_LSE:
                gl.store(lse_ptr + at, lse * 0.6931471805599453, mask=inside)
        gl.store(out_ptr + at[:, None] * D + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=inside[:, None])
    else:
        gl.store(acc_ptr + (part_rows + at)[:, None] * D + channel[None, :], acc, mask=inside[:, None])
        row_at, there = row_addresses(r, first, length, start, head, Hkv, G, GROUP)
        gl.store(state_ptr + part_rows + row_at, top, mask=there)
        gl.store(state_ptr + all_rows + part_rows + row_at, total, mask=there)


@gluon.jit(do_not_specialize=["total_rows", "own_rows", "splits"])
def extend_dense_round(
    query_ptr, k_rows, v_rows, mean_ptr, segments_ptr, starts_ptr, lengths_ptr, block_request, block_first,
    out_ptr, lse_ptr, acc_ptr, state_ptr, total_rows, own_rows, splits,
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
    done = gl.load(segments_ptr + request * 4)
    prefix = gl.load(segments_ptr + request * 4 + 1) - done
    scratch_row = gl.load(segments_ptr + request * 4 + 2)
    last = gl.load(segments_ptr + request * 4 + 3)
    last_token = gl.minimum(first + 2 * CONSUMER_ROWS // GROUP, length)
    prefix_tiles = (prefix + TILE - 1) // TILE
    tiles = prefix_tiles + last * ((last_token + TILE - 1) // TILE)
    first_tile = split * tiles // splits
    last_tile = (split + 1) * tiles // splits
    empty = first_tile == last_tile
    first_tile = gl.where(empty, prefix_tiles, first_tile)
    last_tile = gl.where(empty, prefix_tiles + 1, last_tile)
    part_rows = split.to(gl.int64) * total_rows
    all_rows = splits.to(gl.int64) * total_rows

    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, TILE, D], k_rows.layout)
    v_tiles = gl.allocate_shared_memory(gl.float16, [STAGES, TILE, D], v_rows.layout)
    q_tiles = gl.allocate_shared_memory(gl.float16, [2, CONSUMER_ROWS, D], SWIZZLED)
    order = gl.allocate_shared_memory(gl.float32, [2, CONSUMER_ROWS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full, v_full, k_free, v_free = tile_barriers()
    if tiles > 0:
        gl.warp_specialize(
            [
                (_consume, (
                    first_tile, last_tile, prefix_tiles, prefix, empty, done > 0, last != 0, length, start, first, head, part_rows,
                    all_rows, query_ptr, mean_ptr, out_ptr, lse_ptr, acc_ptr, state_ptr, k_tiles, v_tiles, q_tiles.index(0),
                    order.index(0), k_full, v_full, k_free, v_free, 0, Hkv, G, GROUP, D, PARTIAL, KEEP_LSE,
                )),
                (_consume, (
                    first_tile, last_tile, prefix_tiles, prefix, empty, done > 0, last != 0, length, start, first, head, part_rows,
                    all_rows, query_ptr, mean_ptr, out_ptr, lse_ptr, acc_ptr, state_ptr, k_tiles, v_tiles, q_tiles.index(1),
                    order.index(1), k_full, v_full, k_free, v_free, CONSUMER_ROWS, Hkv, G, GROUP, D, PARTIAL, KEEP_LSE,
                )),
                (_produce, (
                    k_rows, v_rows, first_tile, last_tile, prefix_tiles, scratch_row, own_rows + start, head * D, k_tiles, v_tiles,
                    k_full, v_full, k_free, v_free,
                )),
            ],
            [4, 1], [232, 40],
        )  # fmt: skip


@dataclass(frozen=True)
class DenseBuffers:
    """What `extend_dense` works in, for one layer after the other.

    rows: keys and values in their bases, fp16 [scratch_rows + T, Hkv, D], contiguous; the new tokens' at the end. tiles: their
    descriptors of tiles [TILE, D] of a head. carried float32 [parts, T, Hq, D], state float32 [2, parts, T, Hq]: between rounds; lse
    float32 [parts, T, Hq]: of parts. None where there is one round, or one part.
    """

    rows: tuple[torch.Tensor, torch.Tensor]
    tiles: tuple[TensorDescriptor, TensorDescriptor]
    carried: torch.Tensor | None
    state: torch.Tensor | None
    lse: torch.Tensor | None

    @staticmethod
    def empty(rows: tuple[torch.Tensor, torch.Tensor], plan: ExtendPlan, query_shape: tuple[int, int, int]) -> "DenseBuffers":
        """Room for a plan with rounds, over `rows`."""
        block = [TILE.value, rows[0].shape[2]]
        layout = gl.NVMMASharedLayout.get_default_for(block, gl.float16)
        tiles = tuple(TensorDescriptor.from_tensor(each.view(len(each), -1), block, layout) for each in rows)
        room = lambda *shape: torch.empty(shape, dtype=torch.float32, device=rows[0].device)  # noqa: E731
        carried = state = lse = None
        if plan.splits > 1 or len(plan.rounds.tiles) > 1:
            carried = room(plan.splits, *query_shape)
            state = room(2, plan.splits, *query_shape[:2])
        if plan.splits > 1:
            lse = room(plan.splits, *query_shape[:2])
        return DenseBuffers(rows, tiles, carried, state, lse)


def extend_dense(
    query: torch.Tensor,
    buffers: DenseBuffers,
    layer_cache: tuple[torch.Tensor, ...],
    block_table: torch.Tensor,
    key_parameters: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    value_mean: torch.Tensor,
    sequences: tuple[torch.Tensor, ...],
    plan: ExtendPlan,
    out: torch.Tensor,
    final_lse: torch.Tensor | None = None,
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """`extend` by opening the prefixes first, round by round.

    Args:
        buffers: of this plan; they hold the new tokens' rows.
        query, layer_cache, block_table, key_parameters, value_mean, sequences, out, final_lse, low: as in `extend`.
        plan: with rounds.
    """
    tokens, query_heads, dim = query.shape
    kv_heads = buffers.rows[0].shape[1]
    group = query_heads // kv_heads
    parts = plan.splits > 1
    keep = final_lse is not None and not parts
    target, lse = (buffers.carried, buffers.lse) if parts else (out, final_lse if keep else value_mean)
    carried, state = (value_mean, value_mean) if buffers.carried is None else (buffers.carried, buffers.state)
    for segment, tiles in zip(plan.rounds.segments, plan.rounds.tiles, strict=True):
        open_prefix(tiles, layer_cache, block_table, key_parameters, sequences[:3], buffers.rows, low)
        extend_dense_round[(kv_heads, len(plan.blocks[0]), plan.splits)](
            query, *buffers.tiles, value_mean, segment, *sequences[3:], *plan.blocks, target, lse, carried, state, tokens * query_heads,
            plan.rounds.scratch_rows, plan.splits, Hkv=kv_heads, G=group, GROUP=triton.next_power_of_2(group), D=dim, PARTIAL=parts,
            KEEP_LSE=keep, num_warps=4,
        )  # fmt: skip
    if parts:
        merge_parts(target, lse, value_mean, out, final_lse)
