"""What the consumers of the Hopper extend kernels share: where a program's query rows are, and attention to the tiles that producers bring.

The scores of a tile are computed while the values of the tile before are being added (FlashAttention-3, arXiv 2407.08608, section 3.2).

A program holds 128 query rows: the heads of a GQA group for 128 / group tokens. Row r is token r // GROUP, query head r % GROUP of the
group (GROUP is the group, rounded up to a power of two). Queries carry the softmax scale and log2(e).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from oscar_radix.kernels.extend_plan import ROUND_TILE, ROWS

CONSUMER_ROWS = gl.constexpr(ROWS // 2)
"""Query rows of a consumer."""
TILE = gl.constexpr(ROUND_TILE)
"""Tokens of a tile."""
STAGES = gl.constexpr(2)
"""Tiles of keys, and of values, in shared memory."""


@gluon.jit
def row_addresses(r, first, length, start, head, Hkv: gl.constexpr, G: gl.constexpr, GROUP: gl.constexpr):
    """Rows of [T, Hq] of a program's rows r, int64, and which of them exist."""
    inside = (first + r // GROUP < length) & (r % GROUP < G)
    return (start + first + r // GROUP).to(gl.int64) * (Hkv * G) + head * G + r % GROUP, inside


@gluon.jit
def load_queries(
    query_ptr, q_tile, first, length, start, head,
    FIRST_ROW: gl.constexpr, Hkv: gl.constexpr, G: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Queries of a consumer to shared memory, visible to the tensor cores; rows that do not exist are 0."""
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    r = FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, LOAD))
    at, inside = row_addresses(r, first, length, start, head, Hkv, G, GROUP)
    channel = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    q_tile.store(gl.load(query_ptr + at[:, None] * D + channel[None, :], mask=inside[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def softmax_step(s, top, total, R: gl.constexpr):
    """Online softmax in units of log 2: new maximum, factor for what was accumulated, weights as an fp16 operand, new total."""
    new_top = gl.maximum(top, gl.max(s, 1))
    # A row that has seen no key yet keeps -inf; its weights must be 0, not NaN.
    reference = gl.where(new_top == float("-inf"), 0.0, new_top)
    factor = gl.exp2(top - reference)
    weights = gl.exp2(s - reference[:, None])
    total = total * factor + gl.sum(weights, 1)
    return new_top, factor, gl.convert_layout(weights.to(gl.float16), R), total


@gluon.jit
def mask_scores(s, tile, prefix_tiles, prefix, first, token, S: gl.constexpr):
    """Scores without tokens beyond the prefix, or after the query's own; `first` is the lowest of `token`."""
    column = gl.arange(0, TILE, gl.SliceLayout(0, S))
    if tile < prefix_tiles:
        if tile * TILE + TILE > prefix:
            s = gl.where((tile * TILE + column < prefix)[None, :], s, float("-inf"))
    else:
        own = (tile - prefix_tiles) * TILE
        if own + TILE - 1 > first:
            s = gl.where((own + column)[None, :] <= token[:, None], s, float("-inf"))
    return s


@gluon.jit
def normalise(acc, top, total, OUT: gl.constexpr):
    """Attention output and its log-sum-exp in units of log 2; 0 and -inf for rows without keys."""
    sums = gl.convert_layout(total, gl.SliceLayout(1, OUT))
    return acc * (1.0 / gl.where(sums > 0, sums, 1.0))[:, None], gl.convert_layout(top, gl.SliceLayout(1, OUT)) + gl.log2(sums)


@gluon.jit
def attend_tiles(
    first_tile, last_tile, prefix_tiles, prefix, lowest, token, top, total, acc, q_tile, k_tiles, v_tiles, order,
    k_full, v_full, k_free, v_free, S: gl.constexpr, OUT: gl.constexpr, COPIED: gl.constexpr,
):  # fmt: skip
    """Maximum, total and accumulator of a consumer's rows after tiles first_tile..last_tile - 1, at least one.

    COPIED: the copy engine wrote the tiles. Otherwise threads did, and the fence between their writes and the tensor cores' reads is here
    and not in the producers, which would wait for their loads under way.
    """
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    blank = gl.zeros([CONSUMER_ROWS, TILE], gl.float32, S)
    mbarrier.wait(k_full.index(0), 0)
    if not COPIED:
        fence_async_shared()
    s = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), blank, use_acc=False)
    mbarrier.arrive(k_free.index(0), count=1)
    s = mask_scores(s, first_tile, prefix_tiles, prefix, lowest, token, S)
    top, factor, p, total = softmax_step(s, top, total, P)
    if COPIED:
        # What an earlier round has added; elsewhere there is nothing yet.
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
    for tile in range(first_tile + 1, last_tile):
        turn = tile - first_tile
        stage = turn % STAGES
        before = (turn - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (turn // STAGES) & 1)
        mbarrier.wait(v_full.index(before), ((turn - 1) // STAGES) & 1)
        if not COPIED:
            fence_async_shared()
        s_next = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True)
        acc_next = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, [s_next])
        s = mask_scores(s, tile, prefix_tiles, prefix, lowest, token, S)
        top, factor, p_next, total = softmax_step(s, top, total, P)
        if COPIED:
            # ptxas would compute the weights after the wait below; a store that needs them keeps them here. Beside producers that open
            # records there are too few registers for that.
            order.store(total)
        mbarrier.arrive(k_free.index(stage), count=1)
        acc, p, p_next = warpgroup_mma_wait(0, [acc_next, p, p_next])
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        p = p_next
    turn = last_tile - 1 - first_tile
    mbarrier.wait(v_full.index(turn % STAGES), (turn // STAGES) & 1)
    if not COPIED:
        fence_async_shared()
    return top, total, warpgroup_mma(p, v_tiles.index(turn % STAGES), acc)


@gluon.jit
def tile_barriers():
    """For the tiles of keys and of values: filled by one producer, freed by two consumers. (k_full, v_full, k_free, v_free)."""
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
    return k_full, v_full, k_free, v_free
