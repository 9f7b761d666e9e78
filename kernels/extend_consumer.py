"""What the consumers of the Hopper extend kernels share: where a program's query rows are, masks, online softmax.

A program holds 128 query rows: the heads of a GQA group for 128 / group tokens. Row r is token r // GROUP, query head r % GROUP of the
group (GROUP is the group, rounded up to a power of two). Queries carry the softmax scale and log2(e).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

CONSUMER_ROWS = gl.constexpr(64)
"""Query rows of a consumer."""
TILE = gl.constexpr(128)
"""Tokens of a tile."""


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
