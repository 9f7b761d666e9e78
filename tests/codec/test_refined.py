"""Refined layers: which ones, that their codes are a record's with two bits below, and that kernels can read them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.codec import RECIPES, CalibrationError, quantise_rows
from oscar_radix.codec.allocation import LOW_BITS, PATTERNS, best_counts, expected_error
from oscar_radix.codec.packing import KeyPacking, unpack_values
from oscar_radix.codec.tck import TckRecipe
from oscar_radix.geometry import Geometry
from tests.helpers import RefiningTck, make_codec, random_qkv

from .conftest import fitted_moments

DEEP = Geometry(layers=16, kv_heads=1, query_heads=2, head_dim=64)
"""One of its layers is refined."""


@pytest.fixture(scope="module")
def deep():
    return fitted_moments(DEEP)


def with_damage(moments, layer, name):
    """The moments with a hundredfold `name` in a layer."""
    changed = getattr(moments, name).clone()
    changed[layer] *= 100
    return replace(moments, **{name: changed})


@pytest.mark.parametrize("name", ["logit_damage", "value_damage"])
@pytest.mark.parametrize("layer", [0, 11])
def test_the_layer_whose_outputs_would_change_most_is_refined(deep, name, layer):
    calibration = RECIPES["tck"].fit(with_damage(deep, layer, name))
    assert RECIPES["tck"].codec(calibration, "cpu").refined == (layer,)


def test_damage_counts_relative_to_the_outputs(deep):
    loud = with_damage(with_damage(deep, 3, "value_damage"), 3, "logit_damage")
    assert RECIPES["tck"].codec(RECIPES["tck"].fit(loud), "cpu").refined == (3,)
    quiet = with_damage(loud, 3, "output_energy")
    quiet = with_damage(quiet, 5, "value_damage")
    assert RECIPES["tck"].codec(RECIPES["tck"].fit(quiet), "cpu").refined == (5,)


@pytest.mark.parametrize(("layers", "refined"), [(1, 0), (7, 0), (16, 1), (28, 2), (30, 2), (32, 2), (36, 2), (80, 5)])
def test_a_sixteenth_of_the_layers(layers, refined):
    assert RECIPES["tck"].refined_layers(layers) == refined
    assert RECIPES["mulm"].refined_layers(layers) == RECIPES["oscar"].refined_layers(layers) == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 100))
def test_codes_are_those_of_a_record_with_low_bits_below(seed, scale):
    """`open` of high and low bytes is the definition: (4 high + low - zero) * step * scale, all codes in reach."""
    codec = make_codec("tck", Geometry(2, 2, 4, 64), refined=(1,))
    _, k, v = (scale * rows.float() for rows in random_qkv(codec.geometry, 32, torch.Generator().manual_seed(seed)))
    rows = [quantise_rows(y.transpose(0, 1)[None])[:2] for y in (codec.keys_to_basis(1, k), codec.values_to_basis(1, v))]
    k_codes, v_codes, scales = codec.seal(1, *rows[0], *rows[1])
    packing = KeyPacking.of(codec.key_masks[1].unsqueeze(1), torch.zeros(2, 1, 4, 16, dtype=torch.uint8))
    low = KeyPacking.even(64, "cpu").unpack(k_codes[..., 16:].contiguous())
    fine = 4 * packing.unpack(k_codes[..., :16].contiguous()).int() + low
    top = codec.key_top[1].unsqueeze(1)
    assert bool((fine <= top).all())
    k_open, v_open = codec.open(1, k_codes, v_codes, scales)
    expected = (fine - top / 2) * codec.key_step[1].unsqueeze(1) * scales[..., :1].float()
    torch.testing.assert_close(k_open, expected)
    fine = 4 * unpack_values(v_codes[..., :16].contiguous()).int() + unpack_values(v_codes[..., 16:].contiguous())
    torch.testing.assert_close(v_open, (fine - 7.5) / 4 * scales[..., 1:].float())


def test_no_code_of_a_refined_layer_is_lifted():
    """Kernels put low bits below an operand, so that the operand must be the code."""
    variances = torch.logspace(0, -5, 64, dtype=torch.float64).expand(2, 64)
    counts = best_counts(variances, LOW_BITS)
    used = {PATTERNS[i] for i in counts[0].nonzero().flatten().tolist()}
    assert used <= {(6, 0, 0, 2), (4, 0, 2, 2), (2, 2, 2, 2), (4, 0, 4, 0)}
    assert len(used) > 1
    even = torch.tensor([[8 if p == (2, 2, 2, 2) else 0 for p in PATTERNS]])
    assert float(expected_error(counts, variances, LOW_BITS)[0]) < float(expected_error(even, variances[:1], LOW_BITS))


def test_a_calibration_that_refines_another_number_of_layers_is_refused(deep):
    even, refined = TckRecipe(refined_share=0.0), RECIPES["tck"]
    with pytest.raises(CalibrationError, match=r"refines 0 of 16 layers, recipe 'tck' 1: calibrate again"):
        refined.codec(even.fit(deep), "cpu")
    with pytest.raises(CalibrationError, match="refines 1 of 16 layers"):
        even.codec(refined.fit(deep), "cpu")


def test_widths_that_low_bits_do_not_fit_are_refused(deep):
    """A calibration whose codes are lifted cannot be called refined."""
    even = TckRecipe(refined_share=0.0)
    calibration = even.fit(deep)
    lifted = (KeyPacking(calibration.tensors["key_widths"]).lifts > 0).flatten(1).any(1).nonzero().flatten().tolist()
    assert lifted
    marked = calibration.tensors["refined"].clone()
    marked[lifted[0]] = 1
    with pytest.raises(CalibrationError, match="widths that kernels cannot read"):
        RefiningTck((lifted[0],)).codec(replace(calibration, tensors={**calibration.tensors, "refined": marked}), "cpu")


def test_assign_takes_over_which_layers_are_refined(deep):
    recipe = RECIPES["tck"]
    codecs = [recipe.codec(recipe.fit(with_damage(deep, layer, "value_damage")), "cpu") for layer in (2, 9)]
    codecs[0].assign(codecs[1])
    assert codecs[0].refined == (9,)
    assert codecs[0].low_places.tolist() == [0 if layer == 9 else -1 for layer in range(16)]
