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
def softmax_step(scores, top, total):
    """Online softmax: new running maximum, factor for what was accumulated, weights [M, 32], new total."""
    new_top = tl.maximum(top, tl.max(scores, 1))
    # A row that has seen no key yet keeps -inf; its weights must be 0, not NaN.
    reference = tl.where(new_top == float("-inf"), 0.0, new_top)
    factor = tl.exp2(top - reference)
    weights = tl.exp2(scores - reference[:, None])
    return new_top, factor, weights, total * factor + tl.sum(weights, 1)


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
