"""OscarConfig accepts what can work, and names the flag of what cannot."""

import pickle
from dataclasses import FrozenInstanceError

import pytest

from oscar_radix.config import OscarConfig
from oscar_radix.geometry import Geometry


def test_defaults():
    config = OscarConfig(recipe="tck")
    assert (config.policy, config.recent_tokens, config.recent_pages, config.hot_fraction) == ("attention", 256, 8, 0.12)
    assert config.calibration is None


@pytest.mark.parametrize("recent_tokens", [32, 64, 256, 1024])
def test_whole_pages_of_recent_window(recent_tokens):
    assert OscarConfig(recipe="tck", recent_tokens=recent_tokens).recent_pages == recent_tokens // 32


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("policy", "magic", r"--oscar-policy magic is unknown; choose from \['attention', 'none', 'random', 'window'\]"),
        ("policy_interval", 4, "--oscar-policy-interval 4 must be above 4, the forwards that a decision takes"),
        ("recent_tokens", 0, "--oscar-recent-tokens 0 must be a multiple of the page size 32 and at least 32"),
        ("recent_tokens", 31, "--oscar-recent-tokens 31 must be"),
        ("recent_tokens", 100, "--oscar-recent-tokens 100 must be"),
        ("recent_tokens", -32, "--oscar-recent-tokens -32 must be"),
        ("hot_rows", 0.0, r"--oscar-hot-rows 0\.0 must be above 0 and at most 8"),
        ("hot_rows", 8.5, r"--oscar-hot-rows 8\.5 must be above 0 and at most 8"),
        ("host_gib", -1.0, r"--oscar-host-gib -1\.0 must be 0 or more"),
        ("host_gib", float("nan"), r"--oscar-host-gib nan must be 0 or more"),
        ("hot_fraction", 0.0, r"--oscar-hot-fraction 0\.0 must be above 0 and at most 0\.9"),
        ("hot_fraction", 0.91, r"--oscar-hot-fraction 0\.91 must be"),
        ("hot_fraction", float("nan"), "--oscar-hot-fraction nan must be"),
    ],
)
def test_wrong_value_names_the_flag(field, value, message):
    with pytest.raises(ValueError, match=message):
        OscarConfig(recipe="tck", **{field: value})


def test_frozen_and_picklable():
    """It travels to the scheduler process on ServerArgs."""
    config = OscarConfig(recipe="tck", calibration="file", recent_tokens=64)
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(FrozenInstanceError):
        config.recent_tokens = 32


def test_geometry_refuses_what_no_codec_has():
    with pytest.raises(ValueError, match=r"head_dim 80 is not supported; supported: \(64, 128, 256\)"):
        Geometry(layers=1, kv_heads=1, query_heads=1, head_dim=80)
    with pytest.raises(ValueError, match="7 query heads cannot be shared by 3 KV heads evenly"):
        Geometry(layers=1, kv_heads=3, query_heads=7, head_dim=64)


def test_geometry_counts():
    geometry = Geometry(layers=30, kv_heads=3, query_heads=9, head_dim=64)
    assert geometry.group == 3
    assert geometry.kv_elements_per_token == 30 * 3 * 64 * 2
