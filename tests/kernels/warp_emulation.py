"""The warp functions of `oscar_radix.kernels.warp` in numpy, so that Triton's interpreter runs one-warp kernels.

Fragments as in the PTX ISA, "Matrix fragments for mma.m16n8k32".
"""

from types import ModuleType

import numpy as np
import triton.language as tl

ROW, COLUMN = np.arange(32) // 4, np.arange(32) % 4
"""Lane l has row l // 4 and column pair l % 4 of a fragment."""


def _tensor(values: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    from triton.runtime.interpreter import TensorHandle

    values = np.ascontiguousarray(values.astype({tl.int32: np.int32, tl.float32: np.float32}[dtype]))
    return tl.tensor(TensorHandle(values, dtype), tl.block_type(dtype, [32]))


def _bytes(word: tl.tensor) -> np.ndarray:
    return word.handle.data.view(np.int8).reshape(32, 4).astype(np.int64)


def shuffle(x, lane):
    return _tensor(x.handle.data[lane.handle.data], tl.float32)


def row_sum(x):
    return _tensor(x.handle.data.reshape(8, 4).sum(1).repeat(4), tl.float32)


def row_max(x):
    return _tensor(x.handle.data.reshape(8, 4).max(1).repeat(4), tl.float32)


def exp2(x):
    return _tensor(np.exp2(x.handle.data), tl.float32)


def unpack_half2(word):
    halves = word.handle.data.view(np.float16).reshape(32, 2).astype(np.float32)
    return _tensor(halves[:, 0], tl.float32), _tensor(halves[:, 1], tl.float32)


def load2(pointer):
    pointer = pointer.to(tl.pointer_type(tl.int32))
    return tl.load(pointer), tl.load(pointer + 1)


def mma_int8(a, b0, b1, c):
    left, right = np.zeros((16, 32), dtype=np.int64), np.zeros((32, 8), dtype=np.int64)
    for byte in range(4):
        for word, (rows, first) in zip(a, ((0, 0), (8, 0), (0, 16), (8, 16)), strict=True):
            left[rows + ROW, first + 4 * COLUMN + byte] = _bytes(word)[:, byte]
        for word, first in ((b0, 0), (b1, 16)):
            right[first + 4 * COLUMN + byte, ROW] = _bytes(word)[:, byte]
    product = left @ right
    places = ((ROW, 2 * COLUMN), (ROW, 2 * COLUMN + 1), (8 + ROW, 2 * COLUMN), (8 + ROW, 2 * COLUMN + 1))
    return tuple(_tensor(old.handle.data.astype(np.int64) + product[place], tl.int32) for old, place in zip(c, places, strict=True))


def emulate(*modules: ModuleType) -> None:
    """Put these functions in place of those that `modules` imported from `warp`."""
    for function in (shuffle, row_sum, row_max, exp2, unpack_half2, load2, mma_int8):
        for module in modules:
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)
