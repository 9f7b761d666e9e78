"""What reports of GPU benchmarks keep, and what they make of it."""

from pathlib import Path

import pytest

from benchmarks.gpu_servers import for_the_record
from benchmarks.policy_cost import verdicts


def test_reports_name_no_machine_and_hold_no_tree():
    kept = for_the_record({"calibration": f"cached in {Path.home()}/.cache/x", "forwards": 3, "tree": {"nodes": [], "left_out": 0}})
    assert kept == {"calibration": "cached in ~/.cache/x", "forwards": 3}


def test_cost_of_a_policy_is_beside_none():
    row = lambda policy, rate, single: {"policy": policy, "requests": 10, "tokens_per_s": rate, "single_share": single}  # noqa: E731
    (found,) = verdicts([row("none", 1000.0, 0.01), row("attention", 900.0, 0.03)])
    assert found == {"policy": "attention", "requests": 10, "throughput": pytest.approx(0.9), "work": pytest.approx(0.02)}
