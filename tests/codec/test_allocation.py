"""Widths by reverse water-filling."""

import pytest
import torch

from oscar_radix.codec.allocation import allocations, best_widths


def test_all_falling_sequences_of_four_units():
    # Partitions of 8 into at most 4 parts, each at most 4.
    assert set(allocations(64, 128)) == {
        (4, 4, 0, 0), (4, 3, 1, 0), (4, 2, 2, 0), (4, 2, 1, 1), (3, 3, 2, 0), (3, 3, 1, 1), (3, 2, 2, 1), (2, 2, 2, 2)}


@pytest.mark.parametrize(("head_dim", "count"), [(64, 8), (128, 33)])
def test_every_allocation_has_the_bits(head_dim, count):
    options = allocations(head_dim, 2 * head_dim)
    assert len(set(options)) == len(options) == count
    assert all(16 * sum(o) == 2 * head_dim and list(o) == sorted(o, reverse=True) for o in options)


def test_equal_variances_get_equal_widths():
    assert best_widths(torch.ones(64), 128).counts == (0, 0, 64, 0, 0)


def test_hand_worked_allocation():
    # Variances 16, 4, 1, .25 per unit, mse .0115 .0374 .1188 .3634 1: (3,2,2,1) costs .599 + .475 + .119 + .091 = 1.284;
    # (4,2,2,0) .185 + .475 + .119 + .25 = 1.029; (4,3,1,0) .185 + .150 + .363 + .25 = .948; (4,2,1,1) 1.115; (2,2,2,2) 2.52.
    variances = torch.tensor([16.0, 4, 1, 0.25]).repeat_interleave(16)
    assert best_widths(variances, 128).counts == (16, 16, 0, 16, 16)


def test_impossible_budgets_are_refused():
    with pytest.raises(ValueError, match="100 bits over 64 channels"):
        allocations(64, 100)
