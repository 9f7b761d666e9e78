"""The whole way on a real model: collect, fit, write, describe, and the quality of what comes out."""

import inspect
import pydoc_data.topics
import tarfile

import pytest
import torch

from oscar_radix.calibration.builtin_text import builtin_text
from oscar_radix.calibration.collect import accumulate, calibrate
from oscar_radix.calibration.evaluate import prepare, quality, tail_log_probabilities
from oscar_radix.calibration.file import check_fits, load_calibration
from oscar_radix.calibration.fingerprint import model_fingerprint
from oscar_radix.calibration.report import describe
from oscar_radix.calibration.transformers_attention import geometry_of
from oscar_radix.codec import RECIPES, CalibrationError


@pytest.fixture(scope="module")
def model_moments(loaded):
    model, tokenizer = loaded
    return accumulate(model, tokenizer(builtin_text(), verbose=False)["input_ids"][:2048]).finish()


@pytest.fixture(scope="module")
def passages(loaded):
    """Documentation and source of Python itself: no part of the calibration text."""
    model, tokenizer = loaded
    topics = pydoc_data.topics.topics
    texts = ("\n\n".join(topics[name] for name in sorted(topics))[:20000], inspect.getsource(tarfile)[30000:50000])
    return [prepare(model, tokenizer(text, verbose=False)["input_ids"][:864], 768) for text in texts]


def measure(loaded, passages, recipe, moments, **options):
    codec = recipe.codec(recipe.fit(moments), "cpu")
    return quality(passages, lambda p: tail_log_probabilities(loaded[0], p, codec, **options))


def test_moments_see_post_rope_rows(loaded, model_moments):
    model = loaded[0]
    assert model_moments.geometry == geometry_of(model.config)
    # Two pieces and a passage said twice.
    assert (model_moments.tokens, model_moments.skipped_rows) == (3 * 1024, 0)


def test_int8_rows_are_all_but_exact(loaded, passages, model_moments):
    assert measure(loaded, passages, RECIPES["tck"], model_moments, key_bits=False, value_bits=False).kl < 2e-3


def test_tck_beats_oscar_at_no_more_bits(loaded, passages, model_moments):
    results = {name: measure(loaded, passages, recipe, model_moments) for name, recipe in RECIPES.items()}
    dim = model_moments.geometry.head_dim
    assert RECIPES["tck"].layout(dim).bits_per_element(dim) <= RECIPES["oscar"].layout(dim).bits_per_element(dim)
    assert results["tck"].kl < 0.5 * results["oscar"].kl
    assert results["tck"].kl < 0.06
    assert results["tck"].top1 >= 0.87
    assert results["mulm"].kl < results["oscar"].kl


def test_a_large_key_bias_does_not_collapse(loaded, passages, model_moments):
    model, tokenizer = loaded
    signs = torch.randint(0, 2, model_moments.key_mean.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    size = torch.diagonal(model_moments.key_covariance, dim1=-2, dim2=-1).mean(-1, keepdim=True).sqrt()
    bias = (10 * size * signs).float()
    moments = accumulate(model, tokenizer(builtin_text(), verbose=False)["input_ids"][:2048], key_bias=bias).finish()
    results = {name: measure(loaded, passages, recipe, moments, key_bias=bias) for name, recipe in RECIPES.items()}
    assert results["tck"].kl < 0.06
    assert results["mulm"].kl < 0.1
    assert results["oscar"].kl > 5 * results["tck"].kl


def test_calibrate_writes_a_file_that_fits(loaded, model_dir, tmp_path):
    lines = []
    written = calibrate(model_dir, builtin_text(), None, tmp_path / "c.safetensors", max_tokens=600, progress=lines.append)
    assert lines
    assert written.tokens == 600
    check_fits(load_calibration(tmp_path / "c.safetensors"), model_fingerprint(model_dir), geometry_of(loaded[0].config), "tck")
    text = describe(tmp_path / "c.safetensors")
    assert "30 layers, 3 KV heads, 9 query heads, head dim 64" in text
    assert f"{2.25 + 2 * 2 / 30:.3f} bits" in text
    assert text.count("refined, 2 more in K and V") == 2
    assert "600 tokens" in text
    assert len(text.splitlines()) == 6 + 30 + 2


def test_too_little_text_names_both_numbers(model_dir, tmp_path):
    with pytest.raises(CalibrationError, match=r"saw 300 usable tokens.*at least 512"):
        calibrate(model_dir, builtin_text(), "tck", tmp_path / "c", max_tokens=300)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        calibrate(tmp_path, builtin_text(), "tck", tmp_path / "c")
