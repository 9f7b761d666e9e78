"""A fingerprint tells models apart, and does not mind who wrote config.json."""

import json

import pytest

from oscar_radix.calibration.fingerprint import model_fingerprint, text_fingerprint


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "dtype": "float32", "transformers_version": "5"}))
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 1000)
    return tmp_path


def test_bookkeeping_fields_do_not_matter(folder):
    before = model_fingerprint(folder)
    (folder / "config.json").write_text(json.dumps({"transformers_version": "6", "hidden_size": 8}))
    assert model_fingerprint(folder) == before


def test_architecture_and_weights_do(folder):
    seen = {model_fingerprint(folder), model_fingerprint({"hidden_size": 8})}
    (folder / "config.json").write_text(json.dumps({"hidden_size": 16}))
    seen.add(model_fingerprint(folder))
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    seen.add(model_fingerprint(folder))
    (folder / "model.safetensors").write_bytes(data + b"x")
    seen.add(model_fingerprint(folder))
    assert len(seen) == 5


def test_a_fine_tune_differs(folder):
    before = model_fingerprint(folder)
    (folder / "model.safetensors").write_bytes(bytes(reversed(range(256))) * 1000)
    assert model_fingerprint(folder) != before


def test_texts():
    assert text_fingerprint("a") != text_fingerprint("b")
    with pytest.raises(FileNotFoundError):
        model_fingerprint("no-such-folder")
