"""Widths by reverse water-filling."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oscar_radix.codec.allocation import best_counts, place
from oscar_radix.codec.uniform import GAUSSIAN_MSE


@given(st.sampled_from([64, 128, 256]), st.data())
def test_places_are_a_permutation_with_two_bits_a_channel(dim, data):
    fours = 2 * data.draw(st.integers(0, dim // 4))
    threes = 2 * data.draw(st.integers(0, (dim // 2 - fours) // 2))
    order, widths = place(fours, threes, dim)
    assert torch.equal(order.sort().values, torch.arange(dim))
    assert int(widths.sum()) == 2 * dim
    assert [int((widths == w).sum()) for w in (4, 3, 2, 1, 0)] == [fours, threes, dim - 2 * (fours + threes), threes, fours]
    # The larger a channel's variance, the more bits it has.
    assert (widths[order.argsort()].diff() <= 0).all()


def test_equal_variances_get_equal_widths():
    assert best_counts(torch.ones(2, 64, dtype=torch.float64)).tolist() == [[0, 0], [0, 0]]


def test_hand_worked_allocation():
    # Variances 16, 4, 1, .25 for 16 channels each, mse .0115 .0374 .1188 .3634 1 (4 to 0 bits). The candidates, per 16 channels:
    # all 4/0: .185 + .046 + 1 + .25 = 1.481; 3/1: .599 + .150 + .363 + .091 = 1.203;
    # 16 of 4, 16 of 3, 1, 0: .185 + .150 + .363 + .25 = .948.
    variances = torch.tensor([16.0, 4, 1, 0.25], dtype=torch.float64).repeat_interleave(16)
    assert best_counts(variances).tolist() == [16, 16]


def test_no_allocation_is_better():
    variances = torch.logspace(1, -2, 16, dtype=torch.float64)
    fours, threes = best_counts(variances).tolist()

    def error(a: int, b: int) -> float:
        widths = [4] * a + [3] * b + [2] * (16 - 2 * a - 2 * b) + [1] * b + [0] * a
        return sum(float(v) * GAUSSIAN_MSE[w] for v, w in zip(variances, widths, strict=True))

    assert error(fours, threes) == min(error(a, b) for a in range(0, 9, 2) for b in range(0, 9 - a, 2))


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="33 channels of 4 bits and 0 of 3 do not fit 64"):
        place(33, 0, 64)
