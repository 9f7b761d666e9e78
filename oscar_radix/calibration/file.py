"""Calibration files: safetensors with JSON metadata, never pickle."""

import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from oscar_radix.codec.calibration import Calibration, CalibrationError
from oscar_radix.geometry import Geometry

FORMAT_VERSION = 8
"""Raised whenever a file of before would be fitted differently today, so that cached calibrations are made again."""
_KEY = "oscar_radix.calibration"
_AGAIN = "make it again with `oscar-radix calibrate`"


def save_calibration(path: Path | str, calibration: Calibration) -> None:
    """Write atomically: a reader sees the old file or the whole new one. OSError when the folder cannot be written."""
    path = Path(path)
    header = {
        "format_version": FORMAT_VERSION,
        "recipe": calibration.recipe,
        "geometry": asdict(calibration.geometry),
        "tokens": calibration.tokens,
        "model_name": calibration.model_name,
        "model_fingerprint": calibration.model_fingerprint,
        "text_hash": calibration.text_hash,
        "report": calibration.report,
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in calibration.tensors.items()}
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        save_file(tensors, scratch, metadata={_KEY: json.dumps(header, sort_keys=True)})
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    finally:
        Path(scratch).unlink(missing_ok=True)


def load_calibration(path: Path | str) -> Calibration:
    """Read a file of `save_calibration`; CalibrationError when it is missing, truncated, corrupt, or something else."""
    path = Path(path)
    if not path.is_file():
        raise CalibrationError(f"there is no calibration file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise CalibrationError(f"{path} is truncated, corrupt or no safetensors file ({error}): {_AGAIN}") from error
    if _KEY not in metadata:
        raise CalibrationError(f"{path} is a safetensors file but no calibration: {_AGAIN}")
    try:
        header = json.loads(metadata[_KEY])
        version = header["format_version"]
        if version != FORMAT_VERSION:
            raise CalibrationError(f"{path} has calibration format {version}; this program reads format {FORMAT_VERSION}: calibrate again")
        geometry = Geometry(**header["geometry"])
        fields = {name: header[name] for name in ("recipe", "tokens", "model_name", "model_fingerprint", "text_hash", "report")}
    except CalibrationError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CalibrationError(f"{path} has a damaged header ({error!r}): {_AGAIN}") from error
    damaged = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]
    if damaged:
        raise CalibrationError(f"{path} holds NaN or Inf in {damaged}: {_AGAIN}")
    return Calibration(geometry=geometry, tensors=tensors, **fields)


def check_fits(calibration: Calibration, fingerprint: str, geometry: Geometry, recipe: str) -> None:
    """CalibrationError, naming both sides of every difference, unless the calibration is for this model, geometry and recipe.

    `geometry` is the whole model's for a file that is sharded afterwards, the rank's for a rank's own file.
    """
    model = f"{calibration.model_fingerprint} ({calibration.model_name or 'unnamed'})"
    sides = (
        ("model fingerprint", model, fingerprint, calibration.model_fingerprint == fingerprint),
        ("geometry", calibration.geometry, geometry, calibration.geometry == geometry),
        ("recipe", f"'{calibration.recipe}'", f"'{recipe}'", calibration.recipe == recipe),
    )
    differences = [f"{what}: the file has {theirs}, the server needs {ours}" for what, theirs, ours, same in sides if not same]
    if differences:
        raise CalibrationError(f"this calibration does not fit: {'; '.join(differences)}: {_AGAIN}")
