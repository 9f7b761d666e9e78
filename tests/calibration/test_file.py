"""Calibration files: what is written is read back, and nothing else is accepted."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from oscar_radix.calibration.cache import cache_folder, cache_path, load_cached, store_cached
from oscar_radix.calibration.file import FORMAT_VERSION, check_fits, load_calibration, save_calibration
from oscar_radix.calibration.predicted import fit
from oscar_radix.codec import RECIPES, CalibrationError, get_recipe
from oscar_radix.geometry import Geometry

ALL = pytest.mark.parametrize("name", list(RECIPES))


@pytest.fixture(scope="module")
def calibration(moments):
    return replace(fit(get_recipe("tck"), moments), model_name="small", model_fingerprint="abc", text_hash="def")


@pytest.fixture
def path(tmp_path, calibration):
    save_calibration(tmp_path / "c.safetensors", calibration)
    return tmp_path / "c.safetensors"


@ALL
def test_round_trip_rebuilds_the_codec(name, moments, tmp_path):
    calibration = fit(get_recipe(name), moments)
    save_calibration(tmp_path / "c", calibration)
    loaded = load_calibration(tmp_path / "c")
    assert replace(loaded, tensors={}) == replace(calibration, tensors={})
    assert loaded.tensors.keys() == calibration.tensors.keys()
    for key, tensor in calibration.tensors.items():
        assert torch.equal(tensor, loaded.tensors[key])
    assert get_recipe(name).codec(loaded, "cpu").parameter_bytes == get_recipe(name).codec(calibration, "cpu").parameter_bytes
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_fits(path, geometry):
    check_fits(load_calibration(path), "abc", geometry, "tck")


@pytest.mark.parametrize(
    ("fingerprint", "change", "recipe", "message"),
    [
        ("xyz", {}, "tck", r"model fingerprint: the file has abc \(small\), the server needs xyz"),
        ("abc", {"layers": 3}, "tck", r"geometry: the file has Geometry\(layers=2.*the server needs Geometry\(layers=3"),
        ("abc", {}, "oscar", "recipe: the file has 'tck', the server needs 'oscar'"),
    ],
)
def test_another_model_geometry_or_recipe_is_refused(path, geometry, fingerprint, change, recipe, message):
    with pytest.raises(CalibrationError, match=message):
        check_fits(load_calibration(path), fingerprint, replace(geometry, **change), recipe)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_files_are_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CalibrationError, match="truncated, corrupt or no safetensors"):
        load_calibration(path)


def test_other_files_are_refused(path, tmp_path):
    (tmp_path / "text").write_text("this is not a calibration, and it is long enough to have a header")
    with pytest.raises(CalibrationError, match="no safetensors"):
        load_calibration(tmp_path / "text")
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(CalibrationError, match="no calibration"):
        load_calibration(tmp_path / "other")
    with pytest.raises(CalibrationError, match="there is no calibration file"):
        load_calibration(tmp_path / "absent")


def rewrite(path, change_header=lambda header: None, change_tensors=lambda tensors: None):
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        header = json.loads(file.metadata()["oscar_radix.calibration"])
    tensors = load_file(path)
    change_header(header)
    change_tensors(tensors)
    save_file(tensors, path, metadata={"oscar_radix.calibration": json.dumps(header)})


def test_another_format_names_both_versions(path):
    rewrite(path, lambda header: header.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(CalibrationError, match=f"format {FORMAT_VERSION + 1}; this program reads format {FORMAT_VERSION}"):
        load_calibration(path)


def test_a_damaged_header_is_refused(path):
    rewrite(path, lambda header: header.pop("tokens"))
    with pytest.raises(CalibrationError, match="damaged header"):
        load_calibration(path)


def test_nan_parameters_are_refused(path):
    rewrite(path, change_tensors=lambda tensors: tensors["key_basis"].view(-1)[3].fill_(torch.nan))
    with pytest.raises(CalibrationError, match=r"NaN or Inf in \['key_basis'\]"):
        load_calibration(path)


def test_tensors_of_another_size_are_refused(path):
    rewrite(path, change_tensors=lambda tensors: tensors.update(key_mean=tensors["key_mean"][:1].clone()))
    with pytest.raises(CalibrationError, match="tensor 'key_mean' has shape"):
        load_calibration(path)


def test_missing_tensors_are_refused(path):
    rewrite(path, change_tensors=lambda tensors: tensors.pop("key_sigma"))
    with pytest.raises(CalibrationError, match="key_sigma"):
        get_recipe("tck").codec(load_calibration(path), "cpu")


def test_cache(tmp_path, calibration, geometry, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "oscar_radix" / "calibration"
    path = cache_path("abc", "tck", tp_rank=1, tp_size=2)
    assert path == cache_folder() / "abc" / "tck-tp1of2.safetensors"
    assert load_cached(path, "abc", geometry, "tck") is None
    store_cached(path, calibration)
    assert load_cached(path, "abc", geometry, "tck").model_name == "small"
    assert load_cached(path, "another", geometry, "tck") is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder().is_absolute()


def test_shards_are_the_heads_of_their_rank(calibration):
    shard = calibration.shard(1, 2)
    assert shard.geometry == Geometry(layers=2, kv_heads=2, query_heads=4, head_dim=64)
    assert torch.equal(shard.tensors["key_basis"], calibration.tensors["key_basis"][:, 2:4])
    # More ranks than KV heads: ranks 4 and 5 share KV head 2.
    assert torch.equal(calibration.shard(5, 8).tensors["key_mean"], calibration.tensors["key_mean"][:, 2:3])
    with pytest.raises(CalibrationError, match="4 KV heads and 8 query heads cannot be split over 3"):
        calibration.shard(0, 3)
