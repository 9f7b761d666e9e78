"""What reports of GPU benchmarks keep, and what they make of it."""

from pathlib import Path

import pytest

from benchmarks.gpu_servers import for_the_record
from benchmarks.policy_cost import verdicts


def test_reports_name_no_machine_and_hold_no_tree():
    kept = for_the_record({"calibration": f"cached in {Path.home()}/.cache/x", "forwards": 3, "tree": {"nodes": [], "left_out": 0}})
    assert kept == {"calibration": "cached in ~/.cache/x", "forwards": 3}


def test_cost_of_a_policy_is_beside_none():
    measured = {"requests": 10, "seconds": 4.0, "step_ms": 10.0, "mean_step_ms": 10.2}
    row = lambda policy, rate, slow: {"policy": policy, "tokens_per_s": rate, "slow_steps": slow, **measured}  # noqa: E731
    every_64 = [[60 + 64 * turn, 16.4] for turn in range(5)]
    (found,) = verdicts([row("none", 1000.0, [[17, 90.0]]), row("attention", 900.0, [[2, 50.0], *every_64, [400, 30.0]])])
    assert found == {"policy": "attention", "requests": 10, "throughput": pytest.approx(0.9), "work": pytest.approx(0.01)}
