"""Online softmax of one warp over tiles of 32 tokens (FlashAttention-2, arXiv 2307.08691, section 3.1); see `warp` for its registers.

Scores of a tile are 8 values a lane: [2n] and [2n + 1] of tokens 8n + 2t and 8n + 2t + 1, for the query head of the lane's row g. The
accumulator has four values for each MMA of O^T = V^T P^T: columns 2t and 2t + 1 (query heads) of rows g, then of rows g + 8.
"""

import triton
import triton.language as tl

from oscar_radix.kernels.warp import exp2, half2, row_max, row_sum, shuffle

WEIGHT_SHIFT = tl.constexpr(6.0)
"""Weights are scaled by 2**6, so that fp16 keeps more of the small ones."""
NONE = tl.constexpr(-1e30)


@triton.jit
def rescale(scores, top, acc, exponent, t):
    """New maximum, factor for what was accumulated, the accumulator times it, and the offset of the weights' exponents.

    A weight is exp2(score * exponent + offset).
    """
    peak = tl.maximum(scores[0], scores[1])
    for n in tl.static_range(1, 4):
        peak = tl.maximum(peak, tl.maximum(scores[2 * n], scores[2 * n + 1]))
    new_top = tl.maximum(top, row_max(peak))
    factor = exp2((top - new_top) * exponent)
    even = shuffle(factor, 8 * t)
    odd = shuffle(factor, 8 * t + 4)
    scaled = ()
    for i in tl.static_range(len(acc) // 2):
        scaled = scaled + (acc[2 * i] * even, acc[2 * i + 1] * odd)
    return new_top, factor, scaled, WEIGHT_SHIFT - new_top * exponent


@triton.jit
def weights(scores, scales, exponent, offset, j: tl.constexpr):
    """Of tokens 16j..16j + 15: P^T operand words (weights times V's scales), and the lane's sums of weights without and with them."""
    total = tl.zeros([32], tl.float32)
    scaled = tl.zeros([32], tl.float32)
    words = ()
    for n in tl.static_range(2 * j, 2 * j + 2):
        p0 = exp2(scores[2 * n] * exponent + offset)
        p1 = exp2(scores[2 * n + 1] * exponent + offset)
        w0 = p0 * scales[2 * n]
        w1 = p1 * scales[2 * n + 1]
        total += p0 + p1
        scaled += w0 + w1
        words = words + (half2(w0, w1),)
    return words[0], words[1], total, scaled


@triton.jit
def store_lse(lse_ptr, top, total, exponent, g, t, members, stride):
    """Log-sum-exp, in units of log 2, of the rows (query heads) g < members; `total` already summed over a row's lanes."""
    lse = tl.where(top > NONE, top * exponent + tl.log2(total) - WEIGHT_SHIFT, float("-inf"))
    tl.store(lse_ptr + g * stride, lse, mask=(g < members) & (t == 0))


@triton.jit
def column_sums(total, t):
    """Row sums, their inverses, and those of the lane's two columns."""
    total = row_sum(total)
    inverse = 1.0 / tl.maximum(total, 1e-30)
    return total, inverse, shuffle(inverse, 8 * t), shuffle(inverse, 8 * t + 4)
