"""Which model a calibration belongs to: a cheap hash of its architecture and a sample of its weights."""

import hashlib
import json
from pathlib import Path
from typing import Any

IGNORED_CONFIG = frozenset({"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash"})
"""Fields of config.json that change with the tool that wrote it, not with the model."""
SAMPLES, SAMPLE_BYTES = 16, 4096
LENGTH = 32
"""Hex digits kept."""


def model_fingerprint(model: Path | str | dict[str, Any]) -> str:
    """Hash of a Hugging Face folder (config.json; size, header and 16 samples of every weight file), or of a config dict alone.

    Two fine-tunes of one architecture differ in the samples. Reads at most 80 KB a file. FileNotFoundError without config.json.
    """
    digest = hashlib.sha256()
    if isinstance(model, dict):
        config, files = model, []
    else:
        folder = Path(model)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    kept = {key: value for key, value in config.items() if key not in IGNORED_CONFIG}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with file.open("rb") as data:
            for i in range(SAMPLES):
                data.seek(i * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(data.read(SAMPLE_BYTES))
    return digest.hexdigest()[:LENGTH]


def text_fingerprint(text: str) -> str:
    """Hash of a calibration text."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:LENGTH]
