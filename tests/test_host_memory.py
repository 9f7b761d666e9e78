"""Memory that is available, in a container and outside, against made-up cgroups."""

import psutil
import pytest

from oscar_radix.host_memory import LIMITS, available_bytes


@pytest.mark.parametrize("files", LIMITS)
def test_the_limit_of_a_container(tmp_path, files):
    for name, text in zip(files, ("3000000\n", "1000000\n"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == 2_000_000
    (tmp_path / files[1]).write_text("4000000\n")
    assert available_bytes(tmp_path) == 0


def test_no_limit(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    everything = psutil.virtual_memory()
    assert 0 < available_bytes(tmp_path) <= everything.total
    assert abs(available_bytes(tmp_path) - everything.available) < 0.2 * everything.total


def test_this_machine():
    assert 0 < available_bytes() <= psutil.virtual_memory().total
