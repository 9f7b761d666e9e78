"""What every recipe promises: unchanged scores, batch-invariant codes, contained bad rows, a bounded error."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.codec import DEFAULT_RECIPE, RECIPES, CalibrationError, get_recipe, quantise_rows
from oscar_radix.codec.tck import TckRecipe
from oscar_radix.geometry import Geometry

from .conftest import fitted_moments, random_rows

VARIANTS = {**RECIPES, "tck, refined": TckRecipe(refined_share=1.0)}
ALL = pytest.mark.parametrize("name", list(VARIANTS))


@pytest.fixture(scope="module")
def codecs(moments):
    return {name: recipe.codec(recipe.fit(moments), "cpu") for name, recipe in VARIANTS.items()}


def int8_rows(codec, layer, k, v):
    """k, v [T, H, D] to int8 rows in pool order, one page of T tokens: [1, H, T, D] and [1, H, T], for K and V."""
    rows = []
    for y in (codec.keys_to_basis(layer, k), codec.values_to_basis(layer, v)):
        codes, scale, _ = quantise_rows(y.transpose(0, 1).unsqueeze(0).contiguous())
        rows += [codes, scale]
    return rows


@ALL
def test_scores_and_output_are_unchanged(name, codecs, geometry):
    codec = codecs[name]
    q, k, v = random_rows(50, geometry, seed=11)
    for layer in range(geometry.layers):
        y = codec.keys_to_basis(layer, k).repeat_interleave(geometry.group, 1)
        exact = (q.double() * (k.double() - codec.key_mean[layer].double()).repeat_interleave(geometry.group, 1)).sum(-1)
        scores = (codec.queries_to_basis(layer, q).double() * y.double()).sum(-1)
        assert float((scores - exact).abs().max() / exact.abs().max()) < 1e-4
        o = codec.values_to_basis(layer, v).repeat_interleave(geometry.group, 1)
        torch.testing.assert_close(codec.output_from_basis(layer, o), v.repeat_interleave(geometry.group, 1), rtol=0, atol=1e-5)


@ALL
def test_record_sizes_and_error(name, codecs, geometry):
    codec = codecs[name]
    _, k, v = random_rows(200, geometry, seed=5)
    k_codes, v_codes, scales = codec.seal(0, *int8_rows(codec, 0, k, v))
    parts = 2 if codec.refined else 1
    assert (k_codes.shape[-1], v_codes.shape[-1], scales.shape[-1]) == (
        parts * codec.layout.k_code_bytes, parts * codec.layout.v_code_bytes, codec.layout.scale_count)
    assert (k_codes.dtype, v_codes.dtype, scales.dtype) == (torch.uint8, torch.uint8, torch.float16)
    k_open, v_open = codec.open(0, k_codes, v_codes, scales)
    for got, exact in ((k_open, codec.keys_to_basis(0, k)), (v_open, codec.values_to_basis(0, v))):
        exact = exact.transpose(0, 1).unsqueeze(0)
        assert float((got - exact).square().sum() / exact.square().sum()) < (0.02 if codec.refined else 0.2)


@ALL
@settings(max_examples=25, deadline=None)
@given(cut=st.integers(1, 63), layer=st.integers(0, 1))
def test_same_row_same_codes_whatever_the_batch(name, cut, layer, codecs, geometry):
    codec = codecs[name]
    _, k, v = random_rows(64, geometry, seed=21)
    k, v = k.bfloat16(), v.bfloat16()
    whole = codec.seal(layer, *int8_rows(codec, layer, k, v))
    for part in (slice(0, cut), slice(cut, 64), slice(cut, cut + 1)):
        for all_rows, some in zip(whole, codec.seal(layer, *int8_rows(codec, layer, k[part], v[part])), strict=True):
            assert torch.equal(all_rows[:, :, part], some)


@ALL
def test_bad_rows_become_zeros_and_stay_alone(name, codecs, geometry):
    codec = codecs[name]
    _, k, v = random_rows(32, geometry, seed=31)
    clean = codec.seal(0, *int8_rows(codec, 0, k, v))
    bad_k, bad_v = k.clone(), v.clone()
    bad_k[3, 1, 5], bad_k[7, 0, 0], bad_v[9, 2, 1], bad_v[10, 2] = torch.nan, torch.inf, -torch.inf, 1e30
    rows = int8_rows(codec, 0, bad_k, bad_v)
    assert all(torch.isfinite(scale).all() for scale in (rows[1], rows[3]))
    marks = [quantise_rows(y)[2] for y in (codec.keys_to_basis(0, bad_k), codec.values_to_basis(0, bad_v))]
    assert marks[0].nonzero().tolist() == [[3, 1], [7, 0]]
    assert marks[1].nonzero().tolist() == [[9, 2], [10, 2]]
    sealed = codec.seal(0, *rows)
    k_open, v_open = codec.open(0, *sealed)
    for token, head in marks[0].nonzero().tolist():
        assert not k_open[0, head, token].any()
    for token, head in marks[1].nonzero().tolist():
        assert not v_open[0, head, token].any()
    for whole, some in zip(clean, sealed, strict=True):
        for token in set(range(32)) - {3, 7, 9, 10}:
            assert torch.equal(whole[:, :, token], some[:, :, token])


@ALL
@pytest.mark.parametrize("head_dim", [128, 256])
def test_other_head_dims(name, head_dim):
    geometry = Geometry(layers=1, kv_heads=1, query_heads=2, head_dim=head_dim)
    recipe = VARIANTS[name]
    codec = recipe.codec(recipe.fit(fitted_moments(geometry)), "cpu")
    _, k, v = random_rows(40, geometry, seed=2)
    k_open, v_open = codec.open(0, *codec.seal(0, *int8_rows(codec, 0, k, v)))
    y = codec.keys_to_basis(0, k).transpose(0, 1).unsqueeze(0)
    assert float((k_open - y).square().sum() / y.square().sum()) < 0.2
    assert bool(torch.isfinite(v_open).all())


def key_error_in_scores(codec, q, k, v):
    """Mean square error of q . k over its variance across keys, of 2-bit keys."""
    k_open, _ = codec.open(0, *codec.seal(0, *int8_rows(codec, 0, k, v)))
    q_b, y = codec.queries_to_basis(0, q).unflatten(1, (codec.geometry.kv_heads, -1)), codec.keys_to_basis(0, k)
    exact = torch.einsum("thgd,shd->hgts", q_b, y)
    error = torch.einsum("thgd,shd->hgts", q_b, k_open[0].transpose(0, 1) - y)
    return float(error.var(-1).mean() / exact.var(-1).mean())


def test_a_large_key_bias_hurts_only_the_recipe_without_means(geometry):
    from oscar_radix.calibration.moments import MomentAccumulator

    bias = 100 * torch.randn(geometry.kv_heads, geometry.head_dim, generator=torch.Generator().manual_seed(1))
    errors = {}
    for shift in (0.0, 1.0):
        accumulator = MomentAccumulator(geometry)
        for layer in range(geometry.layers):
            q, k, v = random_rows(600, geometry, seed=layer)
            accumulator.add(layer, q, k + shift * bias, v)
        biased = accumulator.finish()
        q, k, v = random_rows(200, geometry, seed=77)
        for name, recipe in RECIPES.items():
            errors[name, shift] = key_error_in_scores(recipe.codec(recipe.fit(biased), "cpu"), q, k + shift * bias, v)
    for name in ("mulm", "tck"):
        assert errors[name, 1.0] < 1.1 * errors[name, 0.0] + 0.01
    assert errors["oscar", 1.0] > 3 * errors["oscar", 0.0]


def test_registry_names_what_there_is():
    assert DEFAULT_RECIPE in RECIPES
    with pytest.raises(ValueError, match=r"'nope'.*oscar, mulm, tck"):
        get_recipe("nope")


def test_a_calibration_of_another_recipe_is_refused(moments):
    with pytest.raises(CalibrationError, match=r"'mulm', not 'tck'"):
        get_recipe("tck").codec(get_recipe("mulm").fit(moments), "cpu")


def test_bits_at_both_head_dims():
    bits = {name: (r.layout(64).bits_per_element(64), r.layout(128).bits_per_element(128)) for name, r in RECIPES.items()}
    assert bits == {"oscar": (2.5, 2.25), "mulm": (2.25, 2.125), "tck": (2.25, 2.125)}


def test_parameter_bytes(codecs, geometry):
    matrices = 3 * geometry.layers * geometry.kv_heads * geometry.head_dim**2 * 4
    rows = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * 4
    assert codecs["oscar"].parameter_bytes == matrices + rows
