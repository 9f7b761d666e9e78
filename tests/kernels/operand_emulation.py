"""The inline PTX of `oscar_radix.kernels.operands` in numpy, so that Triton's interpreter runs the portable extend kernel."""

import numpy as np
import triton.language as tl


def _tensor(words: np.ndarray) -> tl.tensor:
    from triton.runtime.interpreter import TensorHandle

    words = np.ascontiguousarray(words)
    return tl.tensor(TensorHandle(words, tl.int32), tl.block_type(tl.int32, list(words.shape)))


def _halves(words: np.ndarray) -> np.ndarray:
    """fp16 pairs as float16 [..., 2]."""
    return np.ascontiguousarray(words).view(np.float16).reshape(*words.shape, 2)


def _words(halves: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(halves.astype(np.float16)).view(np.int32)[..., 0]


def _bytes(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words).view(np.uint8).reshape(*words.shape, 4)


def pair(low, high):
    return _tensor(_words(np.stack([low.handle.data, high.handle.data], -1)))


def key_plane(codes, mask, step_low, step_high, shift_low, shift_high, scale):
    operands = _bytes(np.bitwise_and(codes.handle.data, mask.handle.data)).astype(np.float16)
    parts = []
    for first, step, shift in ((0, step_low, shift_low), (2, step_high, shift_high)):
        fused = operands[..., first : first + 2].astype(np.float64) * _halves(step.handle.data) + _halves(shift.handle.data)
        parts.append(_words(fused.astype(np.float16) * _halves(scale.handle.data)))
    return _tensor(np.stack(parts, -1))


def value_plane(words, scale, plane):
    half_words = np.ascontiguousarray(words.handle.data).view(np.uint16).reshape(*words.handle.data.shape, 2)
    codes = (half_words >> (2 * int(getattr(plane, "value", plane)))) & 3
    return _tensor(_words((codes.astype(np.float16) - np.float16(1.5)) * _halves(scale.handle.data)))


def pair_sum(a, b):
    return _tensor(_words(_halves(a.handle.data) + _halves(b.handle.data)))


def int8_rows(words, scale):
    rows = _bytes(words.handle.data).view(np.int8).astype(np.float16)
    pairs = rows.reshape(*words.handle.data.shape, 2, 2) * _halves(scale.handle.data)[..., None, :]
    return _tensor(_words(pairs).reshape(len(pairs), -1))


def emulate(*modules) -> None:
    """Put these functions in place of those of `operands`, in it and in modules that imported them."""
    for function in (pair, pair_sum, key_plane, value_plane, int8_rows):
        for module in modules:
            if hasattr(module, function.__name__):
                setattr(module, function.__name__, function)
