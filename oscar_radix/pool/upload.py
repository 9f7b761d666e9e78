"""Host arrays to the device in one copy that the host does not wait for."""

from collections.abc import Sequence

import numpy as np
import torch

ALIGNMENT = 16
"""Bytes at which each array begins in the packed copy; kernels may load 16 bytes at once."""


def upload(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A copy of `array` on `device`, of the same shape and dtype, in order with the kernels of the current stream."""
    return upload_all([array], device)[0]


def upload_all(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copies of `arrays` on `device`, of the same shapes and dtypes; they share one buffer and one copy.

    The staging buffer is pinned and new each time: torch's host allocator keeps it until the copy has run.
    """
    if device.type == "cpu":
        return [torch.from_numpy(np.array(array)) for array in arrays]
    ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]).tolist()
    staging = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    return _unpack(_pack(arrays, ends, staging).to(device, non_blocking=True), arrays, ends)


def _pack(arrays: Sequence[np.ndarray], ends: list[int], staging: torch.Tensor) -> torch.Tensor:
    to = staging.numpy()
    for array, start in zip(arrays, [0, *ends], strict=False):
        to[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return staging


def _unpack(packed: torch.Tensor, arrays: Sequence[np.ndarray], ends: list[int]) -> list[torch.Tensor]:
    views = []
    for array, start in zip(arrays, [0, *ends], strict=False):
        dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
        views.append(packed[start : start + array.nbytes].view(dtype).view(array.shape))
    return views
