"""Memory that is available, in a container and outside, against made-up cgroups."""

import psutil
import pytest

from oscar_radix.host_memory import LIMITS, available_bytes


@pytest.mark.parametrize(("limit", "used", "kinds", "cached"), LIMITS)
def test_the_limit_of_a_container(tmp_path, limit, used, kinds, cached):
    texts = {limit: "3000000\n", used: "1000000\n", kinds: f"anon 700000\n{cached} 300000\n"}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_bytes(tmp_path) == 2_300_000
    (tmp_path / used).write_text("4000000\n")
    assert available_bytes(tmp_path) == 0


def test_no_limit(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    everything = psutil.virtual_memory()
    assert 0 < available_bytes(tmp_path) <= everything.total
    assert abs(available_bytes(tmp_path) - everything.available) < 0.2 * everything.total


def test_this_machine():
    assert 0 < available_bytes() <= psutil.virtual_memory().total
