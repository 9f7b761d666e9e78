"""A codec whose values are folded codes and returns the same rows, for a model that rotates them itself."""

import pytest
import torch

from oscar_radix.codec import RECIPES, CalibrationError, quantise_rows

from .conftest import random_rows

ALL = pytest.mark.parametrize("name", list(RECIPES))
ATOL = 2e-6
"""float32 roundings of rows of size 1; measured 4e-7."""


def pair(name, moments):
    """(unfolded, folded) codec of one calibration."""
    recipe = RECIPES[name]
    unfolded, folded = (recipe.codec(recipe.fit(moments), "cpu") for _ in range(2))
    for codec in (unfolded, folded):
        codec.value_mean.copy_(torch.randn(codec.value_mean.shape, generator=torch.Generator().manual_seed(1)))
    folded.fold_values()
    return unfolded, folded


@ALL
def test_rows_and_outputs_agree(name, moments, geometry):
    unfolded, folded = pair(name, moments)
    _, _, v = random_rows(50, geometry, seed=3)
    for layer in range(geometry.layers):
        rotation = unfolded.value_rotation[layer].double()
        rotated = torch.einsum("thd,hde->the", v.double(), rotation)
        rows = folded.values_to_basis(layer, rotated)
        torch.testing.assert_close(rows, unfolded.values_to_basis(layer, v), rtol=0, atol=ATOL)
        o = rows.repeat_interleave(geometry.group, 1)
        expected = torch.einsum(
            "thd,hde->the", unfolded.output_from_basis(layer, o).double(), rotation.repeat_interleave(geometry.group, 0)
        )
        torch.testing.assert_close(folded.output_from_basis(layer, o), expected.float(), rtol=0, atol=ATOL)


@ALL
def test_folding_is_in_place(name, moments, geometry):
    recipe = RECIPES[name]
    codec = recipe.codec(recipe.fit(moments), "cpu")
    before = {key: (tensor.data_ptr(), tensor.clone()) for key, tensor in codec._parameters.items()}
    assert not codec.values_folded
    codec.fold_values()
    assert codec.values_folded
    assert torch.equal(codec.value_rotation, torch.eye(geometry.head_dim).expand_as(codec.value_rotation))
    for key, (address, old) in before.items():
        assert codec._parameters[key].data_ptr() == address
        assert key.startswith("value_") or torch.equal(codec._parameters[key], old)


def test_bad_values_stay_bad(moments, geometry):
    _, folded = pair("tck", moments)
    _, _, v = random_rows(4, geometry, seed=3)
    v[1, 0, 5], v[2, 1, 0] = torch.nan, torch.inf
    bad = quantise_rows(folded.values_to_basis(0, v))[2]
    assert bad.nonzero().tolist() == [[1, 0], [2, 1]]


def test_folding_twice_is_an_error(moments):
    _, folded = pair("tck", moments)
    with pytest.raises(CalibrationError, match="folded already; fold a codec once"):
        folded.fold_values()


def test_assign_wants_both_folded_or_none(moments):
    unfolded, folded = pair("tck", moments)
    with pytest.raises(CalibrationError, match=r"unfolded values cannot take .* folded values.*call fold_values on both or on none"):
        unfolded.assign(folded)
    with pytest.raises(CalibrationError, match=r"with folded values cannot take .* unfolded values"):
        folded.assign(unfolded)
    _, other = pair("tck", moments)
    address = other.value_mean.data_ptr()
    other.value_mean.zero_()
    other.assign(folded)
    assert torch.equal(other.value_mean, folded.value_mean)
    assert other.value_mean.data_ptr() == address
