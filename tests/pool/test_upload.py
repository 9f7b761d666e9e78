"""Several arrays in one copy arrive as they were."""

import numpy as np
import pytest
import torch

from oscar_radix.pool import upload as module
from oscar_radix.pool.upload import ALIGNMENT, upload, upload_all

ARRAYS = [
    np.arange(7, dtype=np.int64),
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.zeros((0, 16), dtype=np.int64),
    np.array([200, 1, 2], dtype=np.uint8),
    np.arange(20, dtype=np.int64).reshape(4, 5)[:, ::2],
]


def check(arrays: list[np.ndarray], tensors: list[torch.Tensor]) -> None:
    for array, tensor in zip(arrays, tensors, strict=True):
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)


def test_packed_arrays_arrive():
    ends = np.cumsum([-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in ARRAYS]).tolist()
    packed = module._pack(ARRAYS, ends, torch.empty(ends[-1], dtype=torch.uint8))
    check(ARRAYS, module._unpack(packed, ARRAYS, ends))


def test_on_a_cpu():
    check(ARRAYS, upload_all(ARRAYS, torch.device("cpu")))


def test_what_was_sent_does_not_change_with_its_source():
    source = np.arange(4)
    sent = upload(source, torch.device("cpu"))
    source[:] = 9
    assert sent.tolist() == [0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_without_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        sent = upload_all(ARRAYS, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check(ARRAYS, [tensor.cpu() for tensor in sent])
