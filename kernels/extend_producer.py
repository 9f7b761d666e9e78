"""Producers of the Hopper extend kernel: a warpgroup that fills shared memory with fp16 tiles of keys, another with those of values.

A tile is 128 tokens: of the prefix, from 2-bit records and int8 rows; then of the chunk itself, from its fp16 rows. Fences between
these writes and the tensor cores' reads are the consumers', because here they would wait for loads under way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from oscar_radix.kernels import operands
from oscar_radix.kernels.extend_consumer import STAGES, TILE
from oscar_radix.kernels.extend_layouts import HALF, codes_layout, pairs_layout, rows_layout

LOW_MASKS = gl.constexpr(operands.LOW_MASKS.value)
record_keys = gluon.jit(operands.record_keys.fn)
record_values = gluon.jit(operands.record_values.fn)
int8_rows = gluon.jit(operands.int8_rows.fn)
pair = gluon.jit(operands.pair.fn)
pair_sum = gluon.jit(operands.pair_sum.fn)
twice = gluon.jit(operands.twice.fn)


@gluon.jit
def _set_bits(x):
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _store_key_constants(key_step, key_zero, key_masks, head, constants, D: gl.constexpr, REFINED: gl.constexpr):
    """For each K plane the masks, steps and shifts of `operands.key_plane` to shared memory, [20, 1, D / 16].

    In a refined layer a code counts 4 steps; a step of the low bits follows, [8, 1, D / 16].
    """
    UNIT: gl.constexpr = 4.0 if REFINED else 1.0
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
        constants.index(5 * plane + 1).store(pair(s0 * (UNIT * 0.25**plane), s1 * (UNIT * 0.25**plane))[None, :])
        constants.index(5 * plane + 2).store(pair(s2 * (UNIT * 0.25**plane), s3 * (UNIT * 0.25**plane))[None, :])
        constants.index(5 * plane + 3).store(pair(-s0 * gl.load(key_zero + at), -s1 * gl.load(key_zero + at + 1))[None, :])
        constants.index(5 * plane + 4).store(pair(-s2 * gl.load(key_zero + at + 2), -s3 * gl.load(key_zero + at + 3))[None, :])
        if REFINED:
            constants.index(20 + 2 * plane).store(pair(s0 * 0.25**plane, s1 * 0.25**plane)[None, :])
            constants.index(21 + 2 * plane).store(pair(s2 * 0.25**plane, s3 * 0.25**plane)[None, :])
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
    first = first >> 5
    second = second >> 5
    return first, second, gl.load(row_masks + first * Hkv + head), gl.load(row_masks + second * Hkv + head)


@gluon.jit
def _hot_tokens(first_mask, second_mask, half, prefix, L: gl.constexpr):
    """For each token of a half tile: is it hot and within the prefix, and how many hot tokens of its page come before it."""
    token = gl.arange(0, HALF, gl.SliceLayout(1, L))
    mask = gl.where(token < 32, first_mask, second_mask)
    bit = 1 << (token & 31)
    return ((mask & bit) != 0) & (token < prefix - half * HALF), _set_bits(mask & (bit - 1))


@gluon.jit
def _blocks(first, second, first_mask, second_mask, half, prefix, table_ptr, L: gl.constexpr):
    """Hot block of each hot token; row j of a page's blocks is its j-th hot token."""
    block = gl.zeros([HALF], gl.int32, gl.SliceLayout(1, L))
    if (first_mask | second_mask) != 0:
        hot, index = _hot_tokens(first_mask, second_mask, half, prefix, L)
        token = gl.arange(0, HALF, gl.SliceLayout(1, L))
        block = gl.load(table_ptr + gl.where(token < 32, first, second) * 16 + (index >> 1), mask=hot, other=0)
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
        record = (gl.where(token < 32, first, second) * Hkv + head) * 32 + (token & 31)
        word = gl.arange(0, D // 16, gl.SliceLayout(0, C))
        codes = gl.load(codes_ptr + (record[:, None] * (D // 16) + word[None, :]))
        scale = gl.load(scales + (record * 2 + WHICH), mask=token < prefix - half * HALF, other=0.0)
    return codes, scale


@gluon.jit
def _low_bits(first, second, first_mask, second_mask, head, low_ptr, WHICH: gl.constexpr, Hkv: gl.constexpr, D: gl.constexpr):
    """Low bits of a half tile's cold tokens, in a refined layer."""
    C: gl.constexpr = codes_layout(D, WHICH)
    low = gl.zeros([HALF, D // 16], gl.int32, C)
    if (first_mask & second_mask) != -1:
        token = gl.arange(0, HALF, gl.SliceLayout(1, C))
        record = (gl.where(token < 32, first, second) * Hkv + head) * 32 + (token & 31)
        low = gl.load(low_ptr + (record[:, None] * (D // 16) + gl.arange(0, D // 16, gl.SliceLayout(0, C))[None, :]))
    return low


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
        at = (block * Hkv + head) * 2 + (index & 1)
        word = gl.arange(0, D // 4, gl.SliceLayout(0, R))
        rows = gl.load(hot_ptr + (at[:, None] * (D // 4) + word[None, :]), mask=hot[:, None], other=0)
        scale = gl.load(hot_scales + (at * 2 + WHICH), mask=hot, other=0.0)
    return rows, scale


@gluon.jit
def _open(codes, low, scale, constants, WHICH: gl.constexpr, D: gl.constexpr, REFINED: gl.constexpr):
    """Keys or values of packed words, pairs [HALF, D / 2]; low: the words of low bits, in a refined layer."""
    C: gl.constexpr = codes_layout(D, WHICH)
    if WHICH == 0:
        loaded = ()
        for i in gl.static_range(20):
            loaded = loaded + (constants.index(i).load(C),)
        opened = record_keys(codes, loaded, twice(scale)[:, None])
        if REFINED:
            steps = ()
            none = gl.zeros([1, D // 16], gl.int32, C)
            for i in gl.static_range(4):
                mask = gl.full([1, D // 16], LOW_MASKS[i], gl.int32, C)
                steps = steps + (mask, constants.index(20 + 2 * i).load(C), constants.index(21 + 2 * i).load(C), none, none)
            opened = pair_sum(opened, record_keys(low, steps, twice(scale)[:, None]))
    else:
        opened = record_values(codes, twice(scale)[:, None])
        if REFINED:
            opened = pair_sum(opened, record_values(low, twice((scale * 0.25).to(gl.float16))[:, None]))
    return gl.convert_layout(opened, pairs_layout(D, WHICH), assert_trivial=True)


@gluon.jit
def _produce_prefix(
    first_half, last_half, prefix, row, head, codes_ptr, scales, low_ptr, hot_ptr, hot_scales, row_masks, table_ptr, constants,
    tiles, full, free, WHICH: gl.constexpr, Hkv: gl.constexpr, D: gl.constexpr, REFINED: gl.constexpr,
):  # fmt: skip
    """Open cached tokens, half a tile an iteration."""
    R: gl.constexpr = rows_layout(D, WHICH)
    P: gl.constexpr = pairs_layout(D, WHICH)
    pairs = tiles._reinterpret(gl.int32, [STAGES, TILE, D // 2], gl.NVMMASharedLayout(128, 32, 2))
    s0, s1 = _slots(row, first_half, prefix)
    p0, p1, m0, m1 = _masks(s0, s1, row_masks, head, Hkv)
    block = _blocks(p0, p1, m0, m1, first_half, prefix, table_ptr, R)
    codes, scale = _cold_rows(p0, p1, m0, m1, first_half, prefix, head, codes_ptr, scales, WHICH, Hkv, D)
    low = codes
    if REFINED:
        low = _low_bits(p0, p1, m0, m1, head, low_ptr, WHICH, Hkv, D)
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
            opened = _open(codes, low, scale, constants, WHICH, D, REFINED)
        if (m0 | m1) != 0:
            hot, _ = _hot_tokens(m0, m1, half, prefix, P)
            opened = gl.where(hot[:, None], gl.convert_layout(int8_rows(rows, twice(hot_scale)[:, None]), P, assert_trivial=True), opened)
        # The loads of the next half are under way while this one waits for its place and is stored.
        codes, scale = _cold_rows(next_p0, next_p1, next_m0, next_m1, half + 1, prefix, head, codes_ptr, scales, WHICH, Hkv, D)
        if REFINED:
            low = _low_bits(next_p0, next_p1, next_m0, next_m1, head, low_ptr, WHICH, Hkv, D)
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
    """The chunk's own rows position..position + 127 to shared memory; beyond the chunk its last one, which no query reads there."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    channel = gl.arange(0, D, gl.SliceLayout(0, L))
    for half in gl.static_range(TILE // HALF):
        token = gl.minimum(position + half * HALF + gl.arange(0, HALF, gl.SliceLayout(1, L)), length - 1)
        at = ((start + token).to(gl.int64) * Hkv + head)[:, None] * D + channel[None, :]
        async_copy.async_copy_global_to_shared(tile.slice(half * HALF, HALF), rows_ptr + at)
    async_copy.commit_group()
    async_copy.wait_group(0)


@gluon.jit
def produce(
    first_tile, last_tile, prefix, length, start, row, head,
    codes_ptr, scales, low_ptr, hot_ptr, hot_scales, row_masks, table_ptr, key_step, key_zero, key_masks, own_ptr, constants,
    tiles, full, free, WHICH: gl.constexpr, Hkv: gl.constexpr, D: gl.constexpr, REFINED: gl.constexpr,
):  # fmt: skip
    """Tiles of keys (WHICH = 0) or of values (1) to shared memory: the prefix's, then the chunk's own."""
    prefix_tiles = (prefix + TILE - 1) // TILE
    boundary = gl.minimum(last_tile, prefix_tiles)
    if first_tile < boundary:
        if WHICH == 0:
            _store_key_constants(key_step, key_zero, key_masks, head, constants, D, REFINED)
        _produce_prefix(
            2 * first_tile, 2 * boundary, prefix, row, head, codes_ptr, scales, low_ptr, hot_ptr, hot_scales, row_masks, table_ptr,
            constants, tiles, full, free, WHICH, Hkv, D, REFINED,
        )  # fmt: skip
    for tile in range(gl.maximum(first_tile, prefix_tiles), last_tile):
        turn = tile - first_tile
        stage = turn % STAGES
        mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
        _copy_own((tile - prefix_tiles) * TILE, length, start, head, own_ptr, tiles.index(stage), Hkv, D)
        gl.thread_barrier()
        mbarrier.arrive(full.index(stage), count=1)
