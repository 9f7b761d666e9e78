"""Where automatic calibrations are kept between starts."""

import os
from pathlib import Path

from oscar_radix.calibration.file import check_fits, load_calibration, save_calibration
from oscar_radix.codec.calibration import Calibration, CalibrationError
from oscar_radix.geometry import Geometry


def cache_folder() -> Path:
    """The user's cache folder for calibrations (XDG Base Directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "oscar_radix" / "calibration"


def cache_path(fingerprint: str, recipe: str, tp_rank: int = 0, tp_size: int = 1, folder: Path | None = None) -> Path:
    """The file of one rank; ranks keep their own heads, so a different tensor-parallel size is a different file."""
    return (folder or cache_folder()) / fingerprint / f"{recipe}-tp{tp_rank}of{tp_size}.safetensors"


def load_cached(path: Path, fingerprint: str, geometry: Geometry, recipe: str) -> Calibration | None:
    """The cached calibration, or None when there is none that can be used: then calibrate and `store_cached`."""
    try:
        calibration = load_calibration(path)
        check_fits(calibration, fingerprint, geometry, recipe)
    except CalibrationError:
        return None
    return calibration


def store_cached(path: Path, calibration: Calibration) -> None:
    """Write to the cache atomically, making its folder. OSError when that is not possible."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_calibration(path, calibration)
