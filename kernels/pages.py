"""One page of a mixed-precision KV cache inside a Triton kernel: 2-bit records, int8 rows, online softmax.

Shapes in these helpers: M query rows (a GQA group, or a block of tokens times a group), 32 tokens of a page, D channels in
four planes of Q = D / 4. K plane i is channels i * Q + x; V plane i is channels (b % 2) * D / 2 + i * D / 8 + b // 2 of byte b.
Scores are in units of log 2. All loads of a page are plain row-major `[page][kv head][token][bytes]`.
"""

import triton
import triton.language as tl

PAGE = tl.constexpr(32)
BLOCK_ROWS = tl.constexpr(2)
PAGE_BLOCKS = tl.constexpr(16)


@triton.jit
def value_channels(plane: tl.constexpr, D: tl.constexpr):
    """Channels of V that plane `plane` of the bytes 0..D/4 holds: int32 [D / 4]."""
    byte = tl.arange(0, D // 4)
    return (byte % 2) * (D // 2) + plane * (D // 8) + byte // 2


@triton.jit
def query_plane(query_ptr, rows, row_ok, step_ptr, plane: tl.constexpr, D: tl.constexpr):
    """Plane of the queries in the basis and the same times the static key steps: float32 [M, D / 4] each."""
    channel = plane * (D // 4) + tl.arange(0, D // 4)
    plain = tl.load(query_ptr + rows[:, None] * D + channel[None, :], mask=row_ok[:, None], other=0.0)
    return plain, plain * tl.load(step_ptr + channel)[None, :]


@triton.jit
def key_operand(codes, masks_ptr, plane: tl.constexpr, D: tl.constexpr):
    """Operand of K plane `plane` from packed bytes uint8 [32, D / 4]: fp16 [32, D / 4]."""
    mask = tl.load(masks_ptr + plane * (D // 4) + tl.arange(0, D // 4))
    return ((codes >> (2 * plane)) & mask[None, :]).to(tl.float16)


@triton.jit
def value_operand(codes, plane: tl.constexpr):
    """Codes 0..3 of V plane `plane` from packed bytes uint8 [32, D / 4]: fp16."""
    return ((codes >> (2 * plane)) & 3).to(tl.float16)


@triton.jit
def softmax_step(scores, top, total):
    """Online softmax: new running maximum, factor for what was accumulated, weights [M, 32], new total."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet keeps -inf; its weights must be 0, not NaN.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    factor = tl.exp2(top - reference)
    weights = tl.exp2(scores - reference[:, None])
    return new_top, factor, weights, total * factor + tl.sum(weights, 1)


@triton.jit
def is_hot(row_masks_ptr, page, head, Hkv: tl.constexpr):
    """For each token 0..31 of a page: is it among the page's hot rows for this head? int1 [32]."""
    return ((tl.load(row_masks_ptr + page * Hkv + head) >> tl.arange(0, PAGE)) & 1) != 0


@triton.jit
def load_queries(query_ptr, rows, row_ok, key_step, key_zero, head, softmax_scale, D: tl.constexpr):
    """Query operands for 2-bit pages (times the key steps) and for int8 rows.

    fp16 operands: each row is scaled to at most 1, and the scores are scaled back by `unit_b` and `unit_h`, which include the
    softmax scale. The zero points of all channels are one number for each query, `offset`: sum_c q_c step_c zero_c.

    Returns:
        b0..b3, h0..h3 fp16 [M, D / 4]; unit_b, unit_h, offset float32 [M].
    """
    Q: tl.constexpr = D // 4
    channel = tl.arange(0, Q)
    h0, b0 = query_plane(query_ptr, rows, row_ok, key_step + head * D, 0, D)
    h1, b1 = query_plane(query_ptr, rows, row_ok, key_step + head * D, 1, D)
    h2, b2 = query_plane(query_ptr, rows, row_ok, key_step + head * D, 2, D)
    h3, b3 = query_plane(query_ptr, rows, row_ok, key_step + head * D, 3, D)
    zero = key_zero + head * D + channel
    offset = tl.sum(b0 * tl.load(zero)[None, :] + b1 * tl.load(zero + Q)[None, :], 1) + tl.sum(
        b2 * tl.load(zero + 2 * Q)[None, :] + b3 * tl.load(zero + 3 * Q)[None, :], 1
    )
    unit_b = tl.maximum(tl.maximum(tl.max(tl.abs(b0), 1), tl.max(tl.abs(b1), 1)), tl.maximum(tl.max(tl.abs(b2), 1), tl.max(tl.abs(b3), 1)))
    unit_h = tl.maximum(tl.maximum(tl.max(tl.abs(h0), 1), tl.max(tl.abs(h1), 1)), tl.maximum(tl.max(tl.abs(h2), 1), tl.max(tl.abs(h3), 1)))
    unit_b = tl.maximum(unit_b, 1e-20)
    unit_h = tl.maximum(unit_h, 1e-20)
    b0 = (b0 / unit_b[:, None]).to(tl.float16)
    b1 = (b1 / unit_b[:, None]).to(tl.float16)
    b2 = (b2 / unit_b[:, None]).to(tl.float16)
    b3 = (b3 / unit_b[:, None]).to(tl.float16)
    h0 = (h0 / unit_h[:, None]).to(tl.float16)
    h1 = (h1 / unit_h[:, None]).to(tl.float16)
    h2 = (h2 / unit_h[:, None]).to(tl.float16)
    h3 = (h3 / unit_h[:, None]).to(tl.float16)
    log2_scale = softmax_scale * 1.4426950408889634
    unit_b *= log2_scale
    unit_h *= log2_scale
    offset *= log2_scale
    return b0, b1, b2, b3, h0, h1, h2, h3, unit_b, unit_h, offset


@triton.jit
def attend_hot(
    page, level, valid, head, hot_k, hot_v, hot_scales, table_ptr,
    h0, h1, h2, h3, unit_h, top, total, shift, a0, a1, a2, a3, Hkv: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add the hot rows of one page to the running softmax of M query rows; arguments as in `attend_page`."""
    Q: tl.constexpr = D // 4
    channel = tl.arange(0, Q)
    token = tl.arange(0, PAGE)
    # Row r of the page's hot rows; at level 32 row r is token r.
    held = token < level
    keep = held & ((level < PAGE) | valid)
    block = tl.load(table_ptr + page * PAGE_BLOCKS + token // BLOCK_ROWS, mask=held, other=0)
    at = (block.to(tl.int64) * Hkv + head) * BLOCK_ROWS + token % BLOCK_ROWS
    k_scale = tl.load(hot_scales + at * 2, mask=keep, other=0.0).to(tl.float32)
    v_scale = tl.load(hot_scales + at * 2 + 1, mask=keep, other=0.0).to(tl.float32)
    source = hot_k + at[:, None] * D + channel[None, :]
    s = tl.dot(h0, tl.trans(tl.load(source, mask=keep[:, None], other=0).to(tl.float16)))
    s = tl.dot(h1, tl.trans(tl.load(source + Q, mask=keep[:, None], other=0).to(tl.float16)), s)
    s = tl.dot(h2, tl.trans(tl.load(source + 2 * Q, mask=keep[:, None], other=0).to(tl.float16)), s)
    s = tl.dot(h3, tl.trans(tl.load(source + 3 * Q, mask=keep[:, None], other=0).to(tl.float16)), s)
    s = tl.where(keep[None, :], s * unit_h[:, None] * k_scale[None, :], float("-inf"))
    top, factor, weights, total = softmax_step(s, top, total)
    shift = shift * factor
    p = (weights * v_scale[None, :]).to(tl.float16)
    source = hot_v + at[:, None] * D
    a0 = tl.dot(p, tl.load(source + value_channels(0, D)[None, :], mask=keep[:, None], other=0).to(tl.float16), a0 * factor[:, None])
    a1 = tl.dot(p, tl.load(source + value_channels(1, D)[None, :], mask=keep[:, None], other=0).to(tl.float16), a1 * factor[:, None])
    a2 = tl.dot(p, tl.load(source + value_channels(2, D)[None, :], mask=keep[:, None], other=0).to(tl.float16), a2 * factor[:, None])
    a3 = tl.dot(p, tl.load(source + value_channels(3, D)[None, :], mask=keep[:, None], other=0).to(tl.float16), a3 * factor[:, None])
    return top, total, shift, a0, a1, a2, a3


@triton.jit
def attend_page(
    page, level, valid, head, k_codes, v_codes, scales, hot_k, hot_v, hot_scales, row_masks, table_ptr, key_masks,
    b0, b1, b2, b3, h0, h1, h2, h3, unit_b, unit_h, offset, top, total, shift, a0, a1, a2, a3,
    Hkv: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Add one page to the running softmax of M query rows: its record without the hot rows, then its hot rows.

    Args:
        page, level: page number (int64) and its level.
        valid: int1 [32], tokens that exist and may be read by all rows.
        top, total, shift, a0..a3: running maximum, sum, sum of 1.5 p s_v (the zero point of V), and planes of the output.
    """
    Q: tl.constexpr = D // 4
    channel = tl.arange(0, Q)
    token = tl.arange(0, PAGE)
    head_channels = head * D
    if level < PAGE:
        record = (page * Hkv + head) * PAGE + token
        codes = tl.load(k_codes + record[:, None] * Q + channel[None, :])
        k_scale = tl.load(scales + record * 2).to(tl.float32)
        v_scale = tl.load(scales + record * 2 + 1).to(tl.float32)
        s = tl.dot(b0, tl.trans(key_operand(codes, key_masks + head_channels, 0, D)))
        s = tl.dot(b1, tl.trans(key_operand(codes, key_masks + head_channels, 1, D)), s)
        s = tl.dot(b2, tl.trans(key_operand(codes, key_masks + head_channels, 2, D)), s)
        s = tl.dot(b3, tl.trans(key_operand(codes, key_masks + head_channels, 3, D)), s)
        s = (s * unit_b[:, None] - offset[:, None]) * k_scale[None, :]
        keep = valid
        if level > 0:
            keep = valid & ~is_hot(row_masks, page, head, Hkv)
        s = tl.where(keep[None, :], s, float("-inf"))
        top, factor, weights, total = softmax_step(s, top, total)
        weights *= v_scale[None, :]
        shift = shift * factor + 1.5 * tl.sum(weights, 1)
        p = weights.to(tl.float16)
        codes = tl.load(v_codes + record[:, None] * Q + channel[None, :])
        a0 = tl.dot(p, value_operand(codes, 0), a0 * factor[:, None])
        a1 = tl.dot(p, value_operand(codes, 1), a1 * factor[:, None])
        a2 = tl.dot(p, value_operand(codes, 2), a2 * factor[:, None])
        a3 = tl.dot(p, value_operand(codes, 3), a3 * factor[:, None])
    if level > 0:
        top, total, shift, a0, a1, a2, a3 = attend_hot(
            page, level, valid, head, hot_k, hot_v, hot_scales, table_ptr,
            h0, h1, h2, h3, unit_h, top, total, shift, a0, a1, a2, a3, Hkv, D,
        )  # fmt: skip
    return top, total, shift, a0, a1, a2, a3


@triton.jit
def store_planes(target, row_ok, a0, a1, a2, a3, total, shift, D: tl.constexpr):
    """Normalise and store the output planes of M rows; target: pointers [M, 1] to their channel 0."""
    inverse = 1.0 / tl.where(total > 0, total, 1.0)
    tl.store(target + value_channels(0, D)[None, :], (a0 - shift[:, None]) * inverse[:, None], mask=row_ok[:, None])
    tl.store(target + value_channels(1, D)[None, :], (a1 - shift[:, None]) * inverse[:, None], mask=row_ok[:, None])
    tl.store(target + value_channels(2, D)[None, :], (a2 - shift[:, None]) * inverse[:, None], mask=row_ok[:, None])
    tl.store(target + value_channels(3, D)[None, :], (a3 - shift[:, None]) * inverse[:, None], mask=row_ok[:, None])
