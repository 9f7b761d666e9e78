"""The mean of V is subtracted only where it holds most of the energy of V."""

import torch

from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.codec.value_basis import value_basis

from .conftest import random_rows


def basis_with_bias(geometry, bias):
    accumulator = MomentAccumulator(geometry)
    for layer in range(geometry.layers):
        q, k, v = random_rows(600, geometry, seed=layer)
        accumulator.add(layer, q, k, v + bias)
    return value_basis(accumulator.finish())


def test_small_means_stay(geometry):
    assert not basis_with_bias(geometry, 0.1)["value_mean"].any()


def test_a_bias_is_subtracted(geometry):
    mean = basis_with_bias(geometry, 5.0)["value_mean"]
    torch.testing.assert_close(mean, torch.full_like(mean, 5.0), rtol=0.05, atol=0)
