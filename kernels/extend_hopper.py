"""Extend attention on Hopper: two warpgroups open pages into shared memory, two compute.

A program holds 128 query rows: the heads of a GQA group for 128 / group tokens. One producer turns keys, the other values, from 2-bit
records, int8 rows or the chunk's own rows into fp16 tiles of 128 tokens, so that the cost is hidden and paid once for all rows. Each
consumer keeps 64 rows, and computes the scores of a tile while the values of the tile before are being added (FlashAttention-3,
arXiv 2407.08608, section 3.2). Queries carry the softmax scale and log2(e).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from oscar_radix.kernels import operands

record_keys = gluon.jit(operands.record_keys.fn)
record_values = gluon.jit(operands.record_values.fn)
int8_rows = gluon.jit(operands.int8_rows.fn)
pair = gluon.jit(operands.pair.fn)
twice = gluon.jit(operands.twice.fn)

TILE = gl.constexpr(128)
"""Tokens of a tile."""
HALF = gl.constexpr(64)
"""Tokens that the producer opens at a time: two pages."""
STAGES = gl.constexpr(2)
"""Tiles of keys, and of values, in shared memory."""
CONSUMER_ROWS = gl.constexpr(64)


@gluon.constexpr_function
def _bits(first, last):
    """Bases [0, first], [0, 2 first] ... below [0, last]."""
    found = []
    while first < last:
        found.append([0, first])
        first *= 2
    return found


@gluon.constexpr_function
def _layout(columns, lane_columns, WHICH, width):
    """Layout [HALF, width] in which a lane holds `columns` of one (V) or two (K) tokens.

    The tokens of neighbouring lanes differ in the bits that put them into different banks of a 128-byte swizzled tile.
    """
    if WHICH == 0:
        lanes = [*lane_columns, [4, 0], [1, 0], [2, 0]]
        return gl.DistributedLinearLayout([*columns, [32, 0]], lanes, [[8, 0], [16, 0]], [], [64, width])
    return gl.DistributedLinearLayout(columns, [*lane_columns, [2, 0], [4, 0], [1, 0], [8, 0]], [[16, 0], [32, 0]], [], [64, width])


@gluon.constexpr_function
def codes_layout(D, WHICH):
    """Packed words [HALF, D / 16] of K (WHICH = 0), four lanes a token, or of V (1), two lanes a token."""
    words = D // 64 if WHICH == 0 else D // 32
    return _layout(_bits(1, words), _bits(words, D // 16), WHICH, D // 16)


@gluon.constexpr_function
def _opened_layout(D, WHICH, unit):
    """Layout of opened rows in columns of `unit` pairs: a lane's words of a plane, then the planes."""
    planes = [D // 8, D // 4] if WHICH == 0 else [D // 16, D // 8, D // 4]
    lanes = [D // 32, D // 16] if WHICH == 0 else [D // 32]
    columns = [*_bits(1, D // 32 // unit), *[[0, plane // unit] for plane in planes]]
    return _layout(columns, [[0, lane // unit] for lane in lanes], WHICH, D // 2 // unit)


@gluon.constexpr_function
def pairs_layout(D, WHICH):
    """Opened rows, pairs [HALF, D / 2], as `record_keys` and `record_values` leave them."""
    return _opened_layout(D, WHICH, 1)


@gluon.constexpr_function
def rows_layout(D, WHICH):
    """int8 rows, words [HALF, D / 4], that `int8_rows` opens into `pairs_layout`."""
    return _opened_layout(D, WHICH, 2)


@gluon.jit
def _set_bits(x):
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _store_key_constants(key_step, key_zero, key_masks, head, constants, D: gl.constexpr):
    """For each K plane the masks, steps and shifts of `operands.key_plane` to shared memory, [20, 1, D / 16]."""
    W: gl.constexpr = D // 16
    word = gl.arange(0, W, gl.SliceLayout(0, codes_layout(D, 0)))
    for plane in gl.static_range(4):
        at = head * D + plane * (D // 4) + word * 4
        s0 = gl.load(key_step + at)
        s1 = gl.load(key_step + at + 1)
        s2 = gl.load(key_step + at + 2)
        s3 = gl.load(key_step + at + 3)
        mask = gl.load((key_masks + at).to(gl.pointer_type(gl.int32))) << (2 * plane)
        constants.index(5 * plane).store(mask[None, :])
        constants.index(5 * plane + 1).store(pair(s0 * 0.25**plane, s1 * 0.25**plane)[None, :])
        constants.index(5 * plane + 2).store(pair(s2 * 0.25**plane, s3 * 0.25**plane)[None, :])
        constants.index(5 * plane + 3).store(pair(-s0 * gl.load(key_zero + at), -s1 * gl.load(key_zero + at + 1))[None, :])
        constants.index(5 * plane + 4).store(pair(-s2 * gl.load(key_zero + at + 2), -s3 * gl.load(key_zero + at + 3))[None, :])
    gl.thread_barrier()


# A half tile goes through the producer in five steps, one an iteration, so that no load is waited for: slots; pages and their hot masks;
# blocks of hot rows; codes, rows and scales; conversion.


@gluon.jit
def _slots(row, half, prefix):
    """First slots of the two pages of a half tile; those of page 0 beyond the prefix."""
    position = half * HALF
    return gl.load(row + position, mask=position < prefix, other=0), gl.load(row + position + 32, mask=position + 32 < prefix, other=0)


@gluon.jit
def _masks(first, second, row_masks, head, Hkv: gl.constexpr):
    """Pages of two slots, and which of their tokens are hot for this head."""
    first = first // 32
    second = second // 32
    return first, second, gl.load(row_masks + first * Hkv + head), gl.load(row_masks + second * Hkv + head)


@gluon.jit
def _hot_tokens(first_mask, second_mask, half, prefix, L: gl.constexpr):
    """For each token of a half tile: is it hot and within the prefix, and how many hot tokens of its page come before it."""
    token = gl.arange(0, HALF, gl.SliceLayout(1, L))
    mask = gl.where(token < 32, first_mask, second_mask)
    hot = ((mask >> (token % 32)) & 1) != 0
    return hot & (half * HALF + token < prefix), _set_bits(mask & ((1 << (token % 32)) - 1))


@gluon.jit
def _blocks(first, second, first_mask, second_mask, half, prefix, table_ptr, L: gl.constexpr):
    """Hot block of each hot token; row j of a page's blocks is its j-th hot token."""
    block = gl.zeros([HALF], gl.int32, gl.SliceLayout(1, L))
    if (first_mask | second_mask) != 0:
        hot, index = _hot_tokens(first_mask, second_mask, half, prefix, L)
        token = gl.arange(0, HALF, gl.SliceLayout(1, L))
        block = gl.load(table_ptr + gl.where(token < 32, first, second) * 16 + index // 2, mask=hot, other=0)
    return block


@gluon.jit
def _cold_rows(
    first, second, first_mask, second_mask, half, prefix, head, codes_ptr, scales, WHICH: gl.constexpr, Hkv: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """Codes and scales of a half tile's cold tokens; scale 0 beyond the prefix, so that zeros come of it."""
    C: gl.constexpr = codes_layout(D, WHICH)
    codes = gl.zeros([HALF, D // 16], gl.int32, C)
    scale = gl.zeros([HALF], gl.float16, gl.SliceLayout(1, C))
    if (first_mask & second_mask) != -1:
        token = gl.arange(0, HALF, gl.SliceLayout(1, C))
        page = gl.where(token < 32, first, second).to(gl.int64)
        record = (page * Hkv + head) * 32 + token % 32
        valid = half * HALF + token < prefix
        word = gl.arange(0, D // 16, gl.SliceLayout(0, C))
        codes = gl.load(codes_ptr + record[:, None] * (D // 16) + word[None, :])
        scale = gl.load(scales + record * 2 + WHICH, mask=valid, other=0.0)
    return codes, scale


@gluon.jit
def _hot_rows(
    first_mask, second_mask, block, half, prefix, head, hot_ptr, hot_scales, WHICH: gl.constexpr, Hkv: gl.constexpr, D: gl.constexpr
):  # fmt: skip
    """int8 rows and scales of a half tile's hot tokens."""
    R: gl.constexpr = rows_layout(D, WHICH)
    rows = gl.zeros([HALF, D // 4], gl.int32, R)
    scale = gl.zeros([HALF], gl.float16, gl.SliceLayout(1, R))
    if (first_mask | second_mask) != 0:
        hot, index = _hot_tokens(first_mask, second_mask, half, prefix, R)
        at = (block.to(gl.int64) * Hkv + head) * 2 + index % 2
        word = gl.arange(0, D // 4, gl.SliceLayout(0, R))
        rows = gl.load(hot_ptr + at[:, None] * (D // 4) + word[None, :], mask=hot[:, None], other=0)
        scale = gl.load(hot_scales + at * 2 + WHICH, mask=hot, other=0.0)
    return rows, scale


@gluon.jit
def _open(codes, scale, constants, WHICH: gl.constexpr, D: gl.constexpr):
    """Keys or values of packed words, pairs [HALF, D / 2]."""
    C: gl.constexpr = codes_layout(D, WHICH)
    if WHICH == 0:
        loaded = ()
        for i in gl.static_range(20):
            loaded = loaded + (constants.index(i).load(C),)
        opened = record_keys(codes, loaded, twice(scale)[:, None])
    else:
        opened = record_values(codes, twice(scale)[:, None])
    return gl.convert_layout(opened, pairs_layout(D, WHICH), assert_trivial=True)


@gluon.jit
def _produce_prefix(
    first_half, last_half, prefix, row, head, codes_ptr, scales, hot_ptr, hot_scales, row_masks, table_ptr, constants,
    tiles, full, free, WHICH: gl.constexpr, Hkv: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Open cached tokens, half a tile an iteration."""
    R: gl.constexpr = rows_layout(D, WHICH)
    P: gl.constexpr = pairs_layout(D, WHICH)
    pairs = tiles._reinterpret(gl.int32, [STAGES, TILE, D // 2], gl.NVMMASharedLayout(128, 32, 2))
    s0, s1 = _slots(row, first_half, prefix)
    p0, p1, m0, m1 = _masks(s0, s1, row_masks, head, Hkv)
    block = _blocks(p0, p1, m0, m1, first_half, prefix, table_ptr, R)
    codes, scale = _cold_rows(p0, p1, m0, m1, first_half, prefix, head, codes_ptr, scales, WHICH, Hkv, D)
    rows, hot_scale = _hot_rows(m0, m1, block, first_half, prefix, head, hot_ptr, hot_scales, WHICH, Hkv, D)
    s0, s1 = _slots(row, first_half + 1, prefix)
    next_p0, next_p1, next_m0, next_m1 = _masks(s0, s1, row_masks, head, Hkv)
    next_block = _blocks(next_p0, next_p1, next_m0, next_m1, first_half + 1, prefix, table_ptr, R)
    s0, s1 = _slots(row, first_half + 2, prefix)
    after_p0, after_p1, after_m0, after_m1 = _masks(s0, s1, row_masks, head, Hkv)
    s0, s1 = _slots(row, first_half + 3, prefix)
    for half in range(first_half, last_half):
        turn = (half - first_half) // 2
        stage = turn % STAGES
        opened = gl.zeros([HALF, D // 2], gl.int32, P)
        if (m0 & m1) != -1:
            opened = _open(codes, scale, constants, WHICH, D)
        if (m0 | m1) != 0:
            hot, _ = _hot_tokens(m0, m1, half, prefix, P)
            opened = gl.where(hot[:, None], gl.convert_layout(int8_rows(rows, twice(hot_scale)[:, None]), P, assert_trivial=True), opened)
        # The loads of the next half are under way while this one waits for its place and is stored.
        codes, scale = _cold_rows(next_p0, next_p1, next_m0, next_m1, half + 1, prefix, head, codes_ptr, scales, WHICH, Hkv, D)
        rows, hot_scale = _hot_rows(next_m0, next_m1, next_block, half + 1, prefix, head, hot_ptr, hot_scales, WHICH, Hkv, D)
        m0, m1 = next_m0, next_m1
        next_block = _blocks(after_p0, after_p1, after_m0, after_m1, half + 2, prefix, table_ptr, R)
        next_p0, next_p1, next_m0, next_m1 = after_p0, after_p1, after_m0, after_m1
        after_p0, after_p1, after_m0, after_m1 = _masks(s0, s1, row_masks, head, Hkv)
        s0, s1 = _slots(row, half + 4, prefix)
        if half % 2 == 0:
            mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
            pairs.index(stage).slice(0, HALF).store(opened)
        else:
            pairs.index(stage).slice(HALF, HALF).store(opened)
            gl.thread_barrier()
            mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _copy_own(position, length, start, head, rows_ptr, tile, Hkv: gl.constexpr, D: gl.constexpr):
    """The chunk's own rows position..position + 127 to shared memory; beyond the chunk zeros."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    token = position + gl.arange(0, HALF, gl.SliceLayout(1, L))
    at = ((start + token).to(gl.int64) * Hkv + head)[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, L))[None, :]
    first = gl.load(rows_ptr + at, mask=(token < length)[:, None], other=0.0)
    second = gl.load(rows_ptr + at + HALF * Hkv * D, mask=(token + HALF < length)[:, None], other=0.0)
    tile.slice(0, HALF).store(first)
    tile.slice(HALF, HALF).store(second)


@gluon.jit
def _produce(
    first_tile, last_tile, prefix, length, start, row, head,
    codes_ptr, scales, hot_ptr, hot_scales, row_masks, table_ptr, key_step, key_zero, key_masks, own_ptr, constants,
    tiles, full, free, WHICH: gl.constexpr, Hkv: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Tiles of keys (WHICH = 0) or of values (1) to shared memory: the prefix's, then the chunk's own."""
    prefix_tiles = (prefix + TILE - 1) // TILE
    boundary = gl.minimum(last_tile, prefix_tiles)
    if first_tile < boundary:
        if WHICH == 0:
            _store_key_constants(key_step, key_zero, key_masks, head, constants, D)
        _produce_prefix(
            2 * first_tile, 2 * boundary, prefix, row, head, codes_ptr, scales, hot_ptr, hot_scales, row_masks, table_ptr, constants,
            tiles, full, free, WHICH, Hkv, D,
        )  # fmt: skip
    for tile in range(gl.maximum(first_tile, prefix_tiles), last_tile):
        turn = tile - first_tile
        stage = turn % STAGES
        mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
        _copy_own((tile - prefix_tiles) * TILE, length, start, head, own_ptr, tiles.index(stage), Hkv, D)
        gl.thread_barrier()
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _softmax_step(s, top, total, R: gl.constexpr):
    """Online softmax in units of log 2: new maximum, factor for what was accumulated, weights as an fp16 operand, new total."""
    new_top = gl.maximum(top, gl.max(s, 1))
    # A row that has seen no key yet keeps -inf; its weights must be 0, not NaN.
    reference = gl.where(new_top == float("-inf"), 0.0, new_top)
    factor = gl.exp2(top - reference)
    weights = gl.exp2(s - reference[:, None])
    total = total * factor + gl.sum(weights, 1)
    return new_top, factor, gl.convert_layout(weights.to(gl.float16), R), total


@gluon.jit
def _mask(s, tile, prefix_tiles, prefix, token, S: gl.constexpr):
    """Scores without tokens beyond the prefix, or after the query's own."""
    column = gl.arange(0, TILE, gl.SliceLayout(0, S))
    if tile < prefix_tiles:
        if tile * TILE + TILE > prefix:
            s = gl.where((tile * TILE + column < prefix)[None, :], s, float("-inf"))
    else:
        own = (tile - prefix_tiles) * TILE
        s = gl.where((own + column)[None, :] <= token[:, None], s, float("-inf"))
    return s


@gluon.jit
def _consume(
    first_tile, last_tile, prefix, length, start, first, head, split, total_rows, query_ptr, mean_ptr, out_ptr, lse_ptr,
    k_tiles, v_tiles, q_tile, k_full, v_full, k_free, v_free,
    FIRST_ROW: gl.constexpr, Hkv: gl.constexpr, G: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """64 query rows, from FIRST_ROW of the program's 128."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    LOAD: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    # Row r is token r // GROUP, query head r % GROUP of the group (GROUP is G, rounded up to a power of two).
    r = FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, LOAD))
    inside = (first + r // GROUP < length) & (r % GROUP < G)
    at = (start + first + r // GROUP).to(gl.int64) * (Hkv * G) + head * G + r % GROUP
    channel = gl.arange(0, D, gl.SliceLayout(0, LOAD))
    q_tile.store(gl.load(query_ptr + at[:, None] * D + channel[None, :], mask=inside[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    prefix_tiles = (prefix + TILE - 1) // TILE
    token = first + (FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, S))) // GROUP
    top = gl.full([CONSUMER_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S))
    total = gl.zeros([CONSUMER_ROWS], gl.float32, gl.SliceLayout(1, S))
    acc = gl.zeros([CONSUMER_ROWS, D], gl.float32, OUT)
    blank = gl.zeros([CONSUMER_ROWS, TILE], gl.float32, S)
    mbarrier.wait(k_full.index(0), 0)
    fence_async_shared()
    s = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), blank, use_acc=False)
    mbarrier.arrive(k_free.index(0), count=1)
    s = _mask(s, first_tile, prefix_tiles, prefix, token, S)
    top, factor, p, total = _softmax_step(s, top, total, P)
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
        s = _mask(s, tile, prefix_tiles, prefix, token, S)
        top, factor, p_next, total = _softmax_step(s, top, total, P)
        acc, p = warpgroup_mma_wait(0, [acc_next, p])
        mbarrier.arrive(k_free.index(stage), count=1)
        mbarrier.arrive(v_free.index(before), count=1)
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, OUT))[:, None]
        p = p_next
    turn = last_tile - 1 - first_tile
    mbarrier.wait(v_full.index(turn % STAGES), (turn // STAGES) & 1)
    fence_async_shared()
    acc = warpgroup_mma(p, v_tiles.index(turn % STAGES), acc)

    row = FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, OUT))
    inside = (first + row // GROUP < length) & (row % GROUP < G)
    at = (start + first + row // GROUP).to(gl.int64) * (Hkv * G) + head * G + row % GROUP
    channel = gl.arange(0, D, gl.SliceLayout(0, OUT))
    sums = gl.convert_layout(total, gl.SliceLayout(1, OUT))
    out = acc * (1.0 / gl.where(sums > 0, sums, 1.0))[:, None]
    if PARTIAL:
        at += split.to(gl.int64) * total_rows
        lse = gl.convert_layout(top, gl.SliceLayout(1, OUT)) + gl.log2(sums)
        gl.store(lse_ptr + at, lse, mask=inside)
    else:
        out += gl.load(mean_ptr + head * D + channel)[None, :]
    gl.store(out_ptr + at[:, None] * D + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@gluon.jit(do_not_specialize=["row_stride", "splits", "total_rows"])
def extend_hopper(
    query_ptr, k_ptr, v_ptr, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr,
    key_step, key_zero, key_masks, mean_ptr, req_to_token, req_rows, prefix_lens, starts_ptr, lengths_ptr, block_request, block_first,
    out_ptr, lse_ptr, row_stride, splits, total_rows,
    Hkv: gl.constexpr, G: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PARTIAL: gl.constexpr,
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
    last_token = gl.minimum(first + 128 // GROUP, length)
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
        gl.warp_specialize(
            [
                (_consume, (
                    first_tile, last_tile, prefix, length, start, first, head, split, total_rows, query_ptr, mean_ptr, out_ptr, lse_ptr,
                    k_tiles, v_tiles, q_tiles.index(0), k_full, v_full, k_free, v_free, 0, Hkv, G, GROUP, D, PARTIAL,
                )),
                (_consume, (
                    first_tile, last_tile, prefix, length, start, first, head, split, total_rows, query_ptr, mean_ptr, out_ptr, lse_ptr,
                    k_tiles, v_tiles, q_tiles.index(1), k_full, v_full, k_free, v_free, CONSUMER_ROWS, Hkv, G, GROUP, D, PARTIAL,
                )),
                (_produce, (
                    first_tile, last_tile, prefix, length, start, row, head, k_codes, scales, hot_k, hot_scales, row_masks, table_ptr,
                    key_step, key_zero, key_masks, k_ptr, constants, k_tiles, k_full, k_free, 0, Hkv, D,
                )),
                (_produce, (
                    first_tile, last_tile, prefix, length, start, row, head, v_codes, scales, hot_v, hot_scales, row_masks, table_ptr,
                    key_step, key_zero, key_masks, v_ptr, constants, v_tiles, v_full, v_free, 1, Hkv, D,
                )),
            ],
            [4, 4, 4], [184, 72, 72],
        )  # fmt: skip
