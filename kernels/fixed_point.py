"""Queries of decode as 13-bit fixed point, for int8 tensor cores."""

import triton
import triton.language as tl

QUERY_LEVELS = tl.constexpr(4032.0)
"""Largest fixed-point query: 4032 * sum of a row's largest operands (1040, `codec.allocation.OPERAND_SUM_MAX`) stays below 2**22."""


@triton.jit
def fixed_point(values, factor):
    """Four queries times `factor`, rounded, as two words of int8: their high and low parts, 128 high + low."""
    high_word = tl.zeros([32], tl.int32)
    low_word = tl.zeros([32], tl.int32)
    for j in tl.static_range(4):
        fixed = tl.floor(values[j] * factor + 0.5).to(tl.int32)
        high = (fixed + 64) >> 7
        high_word |= (high & 255) << (8 * j)
        low_word |= ((fixed - high * 128) & 255) << (8 * j)
    return high_word, low_word
