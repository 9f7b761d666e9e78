"""The published quantiser, against vectors worked by hand."""

import pytest
import torch

from oscar_radix.codec.affine import dequantise_, quantise
from oscar_radix.codec.packing import KeyPacking

ROW = torch.tensor([-1, -0.4, 0.1, 0.6, 2, -0.2, 0.9, 0.3])


def test_without_clip():
    codes, scale, zero = quantise(ROW, 0.0)
    assert (scale.item(), zero.item()) == (1.0, 1.0)
    assert codes.tolist() == [0, 1, 1, 2, 3, 1, 2, 1]
    assert KeyPacking(torch.full((8,), 2)).pack(codes).tolist() == [180, 89]
    assert dequantise_(codes.float(), scale, zero).tolist() == [-1, 0, 0, 1, 2, 0, 1, 0]


def test_clipped_at_three_quarters():
    codes, scale, zero = quantise(ROW, 0.75)
    assert scale.item() == pytest.approx(2 / 3, rel=2**-11)
    assert zero.item() == 1.5
    assert codes.tolist() == [0, 1, 2, 2, 3, 1, 3, 2]
    assert KeyPacking(torch.full((8,), 2)).pack(codes).tolist() == [248, 153]
    third = 1 / 3
    expected = torch.tensor([-1, -third, third, third, 1, -third, 1, third])
    torch.testing.assert_close(dequantise_(codes.float(), scale, zero), expected, rtol=1e-3, atol=0)


def test_rounds_half_up():
    # scale 1, zero 0: 0.5 and 1.5 both go up, where rounding to even would give 0 and 2.
    assert quantise(torch.tensor([0.0, 0.5, 1.5, 3.0]), 0.0)[0].tolist() == [0, 1, 2, 3]


def test_constant_row_reads_back_as_zeros():
    codes, scale, zero = quantise(torch.zeros(8), 0.96)
    assert dequantise_(codes.float(), scale, zero).tolist() == [0.0] * 8
