"""Layouts of the Hopper extend kernel's producers: which lane holds which tokens and channels, from packed words to opened rows."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

HALF = gl.constexpr(64)
"""Tokens that a producer opens at a time: two pages."""


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
