"""Extend attention on Hopper: one warpgroup opens pages into shared memory, two compute.

A program holds 128 query rows: the heads of a GQA group for 128 / group tokens. The producer turns 2-bit records, int8 rows and
the chunk's own keys into fp16 tiles of 128 tokens, so that their cost is hidden and paid once for all rows; each of the two consumers
keeps 64 rows, and computes the scores of a tile while the values of the tile before are being added (FlashAttention-3, arXiv
2407.08608, section 3.2). Queries carry the softmax scale and log2(e).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from oscar_radix.kernels import operands

record_keys = gluon.jit(operands.record_keys.fn)
record_values = gluon.jit(operands.record_values.fn)
int8_rows = gluon.jit(operands.int8_rows.fn)

TILE = gl.constexpr(128)
"""Tokens of a tile."""
HALF = gl.constexpr(64)
"""Tokens that the producer opens at a time: two pages."""
STAGES = gl.constexpr(2)
"""Tiles in shared memory."""
CONSUMER_ROWS = gl.constexpr(64)


@gluon.constexpr_function
def key_bytes_layout(D):
    """Packed bytes of K, [tokens, D / 4]: four lanes a token."""
    return gl.BlockedLayout([1, D // 16], [8, 4], [4, 1], [1, 0])


@gluon.constexpr_function
def value_words_layout(D):
    """Packed words of V, [tokens, D / 8]: four lanes a token."""
    return gl.BlockedLayout([1, D // 32], [8, 4], [4, 1], [1, 0])


@gluon.constexpr_function
def _bits(first, last):
    """Bases [0, first], [0, 2 first] ... below [0, last]."""
    found = []
    while first < last:
        found.append([0, first])
        first *= 2
    return found


@gluon.constexpr_function
def key_rows_layout(D):
    """Opened keys [HALF, D], as `record_keys` leaves them: a lane holds D / 16 channels of each plane."""
    return gl.DistributedLinearLayout(
        [*_bits(1, D // 16), [0, D // 4], [0, D // 2], [32, 0]],
        [[0, D // 16], [0, D // 8], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [64, D],
    )  # fmt: skip


@gluon.constexpr_function
def value_rows_layout(D):
    """Opened values [HALF, D], as `record_values` leaves them."""
    return gl.DistributedLinearLayout(
        [*_bits(1, D // 32), [0, D // 8], [0, D // 4], [0, D // 2], [32, 0]],
        [[0, D // 32], [0, D // 16], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]], [], [64, D],
    )  # fmt: skip


@gluon.jit
def _set_bits(x):
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _key_constants(key_step, key_zero, key_masks, head, D: gl.constexpr, plane: gl.constexpr):
    """Mask, step and shift of one K plane (see `operands.key_plane`), [1, D / 4]."""
    Q: gl.constexpr = D // 4
    channel = plane * Q + gl.arange(0, Q, gl.SliceLayout(0, key_bytes_layout(D)))
    step = gl.load(key_step + head * D + channel)
    mask = gl.load(key_masks + head * D + channel) << (2 * plane)
    shift = -step * gl.load(key_zero + head * D + channel)
    return mask[None, :].to(gl.uint8), (step * 0.25**plane)[None, :].to(gl.float16), shift[None, :].to(gl.float16)


@gluon.jit
def _pages(row, half, prefix):
    """Page numbers of the two pages of a half tile; page 0 beyond the prefix."""
    position = half * HALF
    first = gl.load(row + position, mask=position < prefix, other=0) // 32
    second = gl.load(row + position + 32, mask=position + 32 < prefix, other=0) // 32
    return first.to(gl.int64), second.to(gl.int64)


@gluon.jit
def _load_records(first, second, half, prefix, head, k_codes, v_words, scales, Hkv: gl.constexpr, D: gl.constexpr):
    """Codes and scales of a half tile; scales of tokens beyond the prefix are 0, so that they open as zeros."""
    KB: gl.constexpr = key_bytes_layout(D)
    VW: gl.constexpr = value_words_layout(D)
    token = gl.arange(0, HALF, gl.SliceLayout(1, KB))
    record = (gl.where(token < 32, first, second) * Hkv + head) * 32 + token % 32
    valid = half * HALF + token < prefix
    codes = gl.load(k_codes + record[:, None] * (D // 4) + gl.arange(0, D // 4, gl.SliceLayout(0, KB))[None, :])
    k_scale = gl.load(scales + record * 2, mask=valid, other=0.0)
    token = gl.arange(0, HALF, gl.SliceLayout(1, VW))
    record = (gl.where(token < 32, first, second) * Hkv + head) * 32 + token % 32
    valid = half * HALF + token < prefix
    words = gl.load(v_words + record[:, None] * (D // 8) + gl.arange(0, D // 8, gl.SliceLayout(0, VW))[None, :])
    v_scale = gl.load(scales + record * 2 + 1, mask=valid, other=0.0)
    return codes, k_scale, words, v_scale


@gluon.jit
def _with_hot_rows(
    opened, first, second, first_mask, second_mask, half, prefix, head, hot_rows, hot_scales, table_ptr,
    WHICH: gl.constexpr, Hkv: gl.constexpr, D: gl.constexpr, L: gl.constexpr,
):  # fmt: skip
    """Replace the hot tokens of an opened half tile by their int8 rows; row j of a page is its j-th hot token."""
    token = gl.arange(0, HALF, gl.SliceLayout(1, L))
    place = token % 32
    mask = gl.where(token < 32, first_mask, second_mask)
    hot = ((mask >> place) & 1) != 0
    read = hot & (half * HALF + token < prefix)
    index = _set_bits(mask & ((1 << place) - 1))
    block = gl.load(table_ptr + gl.where(token < 32, first, second) * 16 + index // 2, mask=read, other=0).to(gl.int64)
    at = (block * Hkv + head) * 2 + index % 2
    channel = gl.arange(0, D, gl.SliceLayout(0, L))
    rows = gl.load(hot_rows + at[:, None] * D + channel[None, :], mask=read[:, None], other=0)
    scale = gl.load(hot_scales + at * 2 + WHICH, mask=read, other=0.0)
    return gl.where(hot[:, None], int8_rows(rows, scale[:, None]), opened)


@gluon.jit
def _put(tile, rows, half):
    """Rows of a half tile to their place in shared memory."""
    if half % 2 == 0:
        tile.slice(0, HALF).store(rows)
    else:
        tile.slice(HALF, HALF).store(rows)


@gluon.jit
def _produce_prefix(
    first_half, last_half, prefix, row, head,
    k_codes, v_words, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_step, key_zero, key_masks,
    k_tiles, v_tiles, full, free, Hkv: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Open cached tokens, half a tile at a time; records are loaded one half ahead, page numbers two."""
    KR: gl.constexpr = key_rows_layout(D)
    VR: gl.constexpr = value_rows_layout(D)
    m0, s0, z0 = _key_constants(key_step, key_zero, key_masks, head, D, 0)
    m1, s1, z1 = _key_constants(key_step, key_zero, key_masks, head, D, 1)
    m2, s2, z2 = _key_constants(key_step, key_zero, key_masks, head, D, 2)
    m3, s3, z3 = _key_constants(key_step, key_zero, key_masks, head, D, 3)
    first, second = _pages(row, first_half, prefix)
    first_mask = gl.load(row_masks + first * Hkv + head)
    second_mask = gl.load(row_masks + second * Hkv + head)
    codes, k_scale, words, v_scale = _load_records(first, second, first_half, prefix, head, k_codes, v_words, scales, Hkv, D)
    next_first, next_second = _pages(row, first_half + 1, prefix)
    for half in range(first_half, last_half):
        turn = (half - first_half) // 2
        stage = turn % STAGES
        next_first_mask = gl.load(row_masks + next_first * Hkv + head)
        next_second_mask = gl.load(row_masks + next_second * Hkv + head)
        next_codes, next_k_scale, next_words, next_v_scale = _load_records(
            next_first, next_second, half + 1, prefix, head, k_codes, v_words, scales, Hkv, D
        )
        third, fourth = _pages(row, half + 2, prefix)
        if half % 2 == 0:
            mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
        any_cold = (first_mask & second_mask) != -1
        any_hot = (first_mask | second_mask) != 0
        rows = gl.zeros([HALF, D], gl.float16, KR)
        if any_cold:
            opened = record_keys(codes, (m0, m1, m2, m3), (s0, s1, s2, s3), (z0, z1, z2, z3), k_scale[:, None])
            rows = gl.convert_layout(opened, KR, assert_trivial=True)
        if any_hot:
            rows = _with_hot_rows(
                rows, first, second, first_mask, second_mask, half, prefix, head, hot_k, hot_scales, table_ptr, 0, Hkv, D, KR
            )
        _put(k_tiles.index(stage), rows, half)
        rows = gl.zeros([HALF, D], gl.float16, VR)
        if any_cold:
            rows = gl.convert_layout(record_values(words, v_scale[:, None]), VR, assert_trivial=True)
        if any_hot:
            rows = _with_hot_rows(
                rows, first, second, first_mask, second_mask, half, prefix, head, hot_v, hot_scales, table_ptr, 1, Hkv, D, VR
            )
        _put(v_tiles.index(stage), rows, half)
        if half % 2 == 1:
            fence_async_shared()
            gl.thread_barrier()
            mbarrier.arrive(full.index(stage), count=1)
        first, second, first_mask, second_mask = next_first, next_second, next_first_mask, next_second_mask
        codes, k_scale, words, v_scale = next_codes, next_k_scale, next_words, next_v_scale
        next_first, next_second = third, fourth


@gluon.jit
def _copy_own(position, length, start, head, rows_ptr, tile, Hkv: gl.constexpr, D: gl.constexpr):
    """The chunk's own rows position..position + 127 to shared memory; beyond the chunk zeros."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    for part in gl.static_range(4):
        token = position + part * 32 + gl.arange(0, 32, gl.SliceLayout(1, L))
        at = ((start + token).to(gl.int64) * Hkv + head)[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, L))[None, :]
        tile.slice(part * 32, 32).store(gl.load(rows_ptr + at, mask=(token < length)[:, None], other=0.0))


@gluon.jit
def _produce(
    first_tile, last_tile, prefix, length, start, row, head,
    k_codes, v_words, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_step, key_zero, key_masks, k_ptr, v_ptr,
    k_tiles, v_tiles, full, free, Hkv: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    prefix_tiles = (prefix + TILE - 1) // TILE
    boundary = gl.minimum(last_tile, prefix_tiles)
    if first_tile < boundary:
        _produce_prefix(
            2 * first_tile, 2 * boundary, prefix, row, head,
            k_codes, v_words, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_step, key_zero, key_masks,
            k_tiles, v_tiles, full, free, Hkv, D,
        )  # fmt: skip
    for tile in range(gl.maximum(first_tile, prefix_tiles), last_tile):
        turn = tile - first_tile
        stage = turn % STAGES
        mbarrier.wait(free.index(stage), ((turn // STAGES) & 1) ^ 1)
        position = (tile - prefix_tiles) * TILE
        _copy_own(position, length, start, head, k_ptr, k_tiles.index(stage), Hkv, D)
        _copy_own(position, length, start, head, v_ptr, v_tiles.index(stage), Hkv, D)
        fence_async_shared()
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
    k_tiles, v_tiles, q_tile, full, free,
    FIRST_ROW: gl.constexpr, Hkv: gl.constexpr, G: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    """64 query rows, from FIRST_ROW of the program's 128."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
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
    acc = gl.zeros([CONSUMER_ROWS, D], gl.float32, O)
    blank = gl.zeros([CONSUMER_ROWS, TILE], gl.float32, S)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), blank, use_acc=False)
    s = _mask(s, first_tile, prefix_tiles, prefix, token, S)
    top, factor, p, total = _softmax_step(s, top, total, P)
    for tile in range(first_tile + 1, last_tile):
        turn = tile - first_tile
        stage = turn % STAGES
        before = (turn - 1) % STAGES
        mbarrier.wait(full.index(stage), (turn // STAGES) & 1)
        s_next = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), blank, use_acc=False, is_async=True)
        acc_next = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
        s = warpgroup_mma_wait(1, [s_next])
        s = _mask(s, tile, prefix_tiles, prefix, token, S)
        top, factor, p_next, total = _softmax_step(s, top, total, P)
        acc, p = warpgroup_mma_wait(0, [acc_next, p])
        mbarrier.arrive(free.index(before), count=1)
        acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, O))[:, None]
        p = p_next
    acc = warpgroup_mma(p, v_tiles.index((last_tile - 1 - first_tile) % STAGES), acc)

    row = FIRST_ROW + gl.arange(0, CONSUMER_ROWS, gl.SliceLayout(1, O))
    inside = (first + row // GROUP < length) & (row % GROUP < G)
    at = (start + first + row // GROUP).to(gl.int64) * (Hkv * G) + head * G + row % GROUP
    channel = gl.arange(0, D, gl.SliceLayout(0, O))
    sums = gl.convert_layout(total, gl.SliceLayout(1, O))
    out = acc * (1.0 / gl.where(sums > 0, sums, 1.0))[:, None]
    if PARTIAL:
        at += split.to(gl.int64) * total_rows
        lse = gl.convert_layout(top, gl.SliceLayout(1, O)) + gl.log2(sums)
        gl.store(lse_ptr + at, lse, mask=inside)
    else:
        out += gl.load(mean_ptr + head * D + channel)[None, :]
    gl.store(out_ptr + at[:, None] * D + channel[None, :], out.to(out_ptr.dtype.element_ty), mask=inside[:, None])


@gluon.jit(do_not_specialize=["row_stride", "splits", "total_rows"])
def extend_hopper(
    query_ptr, k_ptr, v_ptr, k_codes, v_words, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr,
    key_step, key_zero, key_masks, mean_ptr, req_to_token, req_rows, prefix_lens, starts_ptr, lengths_ptr, block_request, block_first,
    out_ptr, lse_ptr, row_stride, splits, total_rows,
    Hkv: gl.constexpr, G: gl.constexpr, GROUP: gl.constexpr, D: gl.constexpr, PARTIAL: gl.constexpr,
):  # fmt: skip
    head = gl.program_id(0)
    block = gl.program_id(1)
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
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    if last_tile > first_tile:
        gl.warp_specialize(
            [
                (_consume, (
                    first_tile, last_tile, prefix, length, start, first, head, split, total_rows, query_ptr, mean_ptr, out_ptr, lse_ptr,
                    k_tiles, v_tiles, q_tiles.index(0), full, free, 0, Hkv, G, GROUP, D, PARTIAL,
                )),
                (_consume, (
                    first_tile, last_tile, prefix, length, start, first, head, split, total_rows, query_ptr, mean_ptr, out_ptr, lse_ptr,
                    k_tiles, v_tiles, q_tiles.index(1), full, free, CONSUMER_ROWS, Hkv, G, GROUP, D, PARTIAL,
                )),
                (_produce, (
                    first_tile, last_tile, prefix, length, start, row, head,
                    k_codes, v_words, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_step, key_zero, key_masks, k_ptr, v_ptr,
                    k_tiles, v_tiles, full, free, Hkv, D,
                )),
            ],
            [4, 4], [192, 120],
        )  # fmt: skip
