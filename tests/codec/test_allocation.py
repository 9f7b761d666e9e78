"""Widths by reverse water-filling."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oscar_radix.codec import CalibrationError, get_recipe
from oscar_radix.codec.allocation import NARROW, OPERAND_SUM_MAX, OPERAND_TOPS, WIDE, best_counts, expected_error, is_readable, place
from oscar_radix.codec.packing import KeyPacking
from oscar_radix.codec.uniform import GAUSSIAN_MSE

EVEN = [0] * (len(WIDE) - 1) + [1, 0, 0, 1]


@st.composite
def byte_counts(draw):
    """(D, bytes of each pattern)."""
    dim = draw(st.sampled_from([64, 128, 256]))
    kinds = [draw(st.lists(st.sampled_from(range(len(kind))), min_size=dim // 8, max_size=dim // 8)) for kind in (WIDE, NARROW)]
    return dim, [kinds[0].count(i) for i in range(len(WIDE))] + [kinds[1].count(i) for i in range(len(NARROW))]


@given(byte_counts())
def test_places_are_a_permutation_with_two_bits_a_channel(counted):
    dim, counts = counted
    order, widths = place(counts, dim)
    assert torch.equal(order.sort().values, torch.arange(dim))
    assert int(widths.sum()) == 2 * dim
    # The larger a channel's variance, the more bits it has.
    assert (widths[order.argsort()].diff() <= 0).all()
    masks = KeyPacking(widths).masks
    assert is_readable(masks) == (int(torch.tensor(counts) @ OPERAND_TOPS) <= OPERAND_SUM_MAX)
    # What the kernels rely on: half of the words have 2 bits in their last plane, the other half two nibbles that are alike.
    masks = masks.view(4, -1, 2, 4)
    assert (masks[3, :, 0] == 3).all()
    assert torch.equal(masks[:2, :, 1], masks[2:, :, 1])


def test_equal_variances_get_equal_widths():
    assert best_counts(torch.ones(2, 64, dtype=torch.float64)).tolist() == [[8 * n for n in EVEN]] * 2


def test_hand_worked_allocation():
    # D = 32, two channels of variance 512, the rest 1. Each of the two in a byte of its own, that byte's error beside 2 bits for two:
    # 6 + 0 + 0 + 2: 512 * .00104 + 2 = 2.53; 5 + 0 + 1 + 2: 512 * .0035 + 1.36 = 3.15; 4 + 0 + 2 + 2: 512 * .0115 + 1.12 - .24 = 6.8.
    variances = torch.tensor([512.0] * 2 + [1.0] * 30, dtype=torch.float64)
    counts = best_counts(variances).tolist()
    assert counts == [2, 0, 0, 0, 0, 0, 2, 0, 0, 4]
    error = 1024 * GAUSSIAN_MSE[6] + 4 * GAUSSIAN_MSE[0] + 26 * GAUSSIAN_MSE[2]
    assert float(expected_error(torch.tensor(counts), variances)) == pytest.approx(error)


@given(st.floats(0.2, 5), st.integers(0, 2**31))
def test_no_allocation_is_much_better(spread, seed):
    """Against all of a small row, D = 32: four wide bytes and four narrow ones."""
    noise = torch.randn(32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    variances = (spread * noise).exp().sort(descending=True).values
    kinds = [
        [[chosen.count(i) for i in range(len(kind))] for chosen in itertools.combinations_with_replacement(range(len(kind)), 4)]
        for kind in (WIDE, NARROW)
    ]
    every = torch.tensor([wide + narrow for wide in kinds[0] for narrow in kinds[1]])
    best = float(expected_error(every, variances).min())
    assert best <= float(expected_error(best_counts(variances), variances)) <= 1.05 * best


@pytest.mark.parametrize(("decades", "more", "of_four_bits"), [(4, 1.023, 1.32), (5, 1.067, 2.08)])
def test_error_beside_the_best_free_choice(decades, more, of_four_bits):
    variances = torch.logspace(0, -decades, 64, dtype=torch.float64)

    def free(widest: int) -> float:
        """Each next bit where it removes most error."""
        gains = torch.stack([variances * (GAUSSIAN_MSE[w] - GAUSSIAN_MSE[w + 1]) for w in range(widest)])
        return float(variances.sum() - gains.flatten().topk(128).values.sum())

    assert float(expected_error(best_counts(variances), variances)) < more * free(6)
    assert free(4) > of_four_bits * free(6)


@given(st.floats(0, 12), st.integers(0, 2**31))
def test_operands_stay_within_what_fixed_point_scores_can_hold(spread, seed):
    noise = torch.randn(128, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    counts = best_counts((spread * noise).exp().sort(descending=True).values)
    assert int(counts @ OPERAND_TOPS) <= OPERAND_SUM_MAX
    masks = KeyPacking(place(counts.tolist(), 128)[1]).masks
    assert int(masks.sum()) <= OPERAND_SUM_MAX


def test_largest_operands_by_hand():
    # 6 + 0 + 0 + 2: 63 + 3; 5 + 0 + 1 + 2: 31 + 2 + 3, the 1-bit code stands one bit above its plane; 3 + 3 + 0 + 2: 7 + 14 + 3.
    assert OPERAND_TOPS.tolist() == [66, 36, 21, 24, 24, 18, 12, 30, 18, 12]


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="a row of 64 channels has 8 bytes of each kind"):
        place([9, 0, 0, 0, 0, 0, 0, 0, 0, 7], 64)


def test_widths_at_places_that_kernels_do_not_expect_are_refused(moments, geometry):
    recipe = get_recipe("tck")
    fitted = recipe.fit(moments)
    widths = torch.full((*fitted.tensors["key_widths"].shape[:2], 4, geometry.head_dim // 4), 2, dtype=torch.uint8)
    widths[0, 1, :, 5] = torch.tensor([6, 0, 0, 2])  # an odd word
    with pytest.raises(CalibrationError, match="other widths than kernels can read at their places: calibrate again"):
        recipe.codec(replace(fitted, tensors={**fitted.tensors, "key_widths": widths.flatten(-2)}), "cpu")
