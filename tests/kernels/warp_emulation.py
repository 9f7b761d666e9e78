"""The warp functions of `oscar_radix.kernels.warp` in numpy, so that Triton's interpreter runs one-warp kernels.

Fragments as in the PTX ISA, "Matrix fragments for mma.m16n8k32".
"""

from types import ModuleType

import numpy as np
import triton.language as tl

ROW, COLUMN = np.arange(32) // 4, np.arange(32) % 4
"""Lane l has row l // 4 and column pair l % 4 of a fragment."""

PLACES = ((ROW, 2 * COLUMN), (ROW, 2 * COLUMN + 1), (8 + ROW, 2 * COLUMN), (8 + ROW, 2 * COLUMN + 1))
"""Of a lane's four values in a result."""


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


def half2(low, high):
    return _tensor(_pair(low.handle.data, high.handle.data), tl.int32)


def _pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.stack([low, high], -1).astype(np.float16).view(np.int32).reshape(-1)


def _permuted(a, b, selector) -> tl.tensor:
    """PRMT: byte i of the result is byte (selector >> 4i) & 7 of a (0..3) and b (4..7)."""
    both = np.concatenate([_bytes(a), _bytes(b)], -1).astype(np.uint8)
    places = np.stack([(selector >> shift) & 7 for shift in (0, 4, 8, 12)], -1)
    return _tensor(np.take_along_axis(both, np.broadcast_to(places, (32, 4)), -1).view(np.int32).reshape(-1), tl.int32)


def low_halves(a, b):
    return _permuted(a, b, np.int32(0x5410))


def high_halves(a, b):
    return _permuted(a, b, np.int32(0x7632))


def select_halves(a, b, selector):
    return _permuted(a, b, selector.handle.data)


def interleave_low(a, b):
    return _permuted(a, b, np.int32(0x5140))


def interleave_high(a, b):
    return _permuted(a, b, np.int32(0x7362))


def low_bytes_to_half2(word):
    unsigned = _bytes(word).astype(np.uint8).astype(np.float32) - 128
    return _tensor(_pair(unsigned[:, 0], unsigned[:, 1]), tl.int32)


def high_bytes_to_half2(word):
    unsigned = _bytes(word).astype(np.uint8).astype(np.float32) - 128
    return _tensor(_pair(unsigned[:, 2], unsigned[:, 3]), tl.int32)


def load1(pointer):
    return tl.load(pointer.to(tl.pointer_type(tl.int32)))


def load2(pointer):
    pointer = pointer.to(tl.pointer_type(tl.int32))
    return tl.load(pointer), tl.load(pointer + 1)


def load4(pointer):
    pointer = pointer.to(tl.pointer_type(tl.int32))
    return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)


def store2(pointer, a, b, keep):
    tl.store(pointer, a, mask=keep)
    tl.store(pointer + 1, b, mask=keep)


def store4(pointer, a, b, c, d, keep):
    store2(pointer, a, b, keep)
    store2(pointer + 2, c, d, keep)


def _halves(word: tl.tensor) -> np.ndarray:
    return word.handle.data.view(np.float16).reshape(32, 2).astype(np.float32)


def mma_fp16(a, b0, b1, c):
    left, right = np.zeros((16, 16), dtype=np.float32), np.zeros((16, 8), dtype=np.float32)
    for half in range(2):
        for word, (rows, first) in zip(a, ((0, 0), (8, 0), (0, 8), (8, 8)), strict=True):
            left[rows + ROW, first + 2 * COLUMN + half] = _halves(word)[:, half]
        for word, first in ((b0, 0), (b1, 8)):
            right[first + 2 * COLUMN + half, ROW] = _halves(word)[:, half]
    product = left @ right
    return tuple(_tensor(old.handle.data + product[place], tl.float32) for old, place in zip(c, PLACES, strict=True))


def mma_int8(a, b0, b1, c, unsigned=False):
    left, right = np.zeros((16, 32), dtype=np.int64), np.zeros((32, 8), dtype=np.int64)
    for byte in range(4):
        for word, (rows, first) in zip(a, ((0, 0), (8, 0), (0, 16), (8, 16)), strict=True):
            left[rows + ROW, first + 4 * COLUMN + byte] = _bytes(word)[:, byte]
        for word, first in ((b0, 0), (b1, 16)):
            right[first + 4 * COLUMN + byte, ROW] = _bytes(word)[:, byte] & (255 if unsigned else -1)
    product = left @ right
    return tuple(_tensor(old.handle.data.astype(np.int64) + product[place], tl.int32) for old, place in zip(c, PLACES, strict=True))


def mma_int8_uint8(a, b0, b1, c):
    return mma_int8(a, b0, b1, c, unsigned=True)


FUNCTIONS = (
    shuffle, row_sum, row_max, exp2, half2, unpack_half2, low_halves, high_halves, select_halves, interleave_low, interleave_high,
    low_bytes_to_half2, high_bytes_to_half2, load1, load2, load4, store2, store4, mma_int8, mma_int8_uint8,
    mma_fp16,
)  # fmt: skip


def emulate(*modules: ModuleType) -> None:
    """Put these functions in place of those that `modules` imported from `warp`."""
    for function in FUNCTIONS:
        for module in modules:
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)
