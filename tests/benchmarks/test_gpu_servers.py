"""What a benchmark's report keeps of a server's."""

from pathlib import Path

from benchmarks.gpu_servers import for_the_record


def test_reports_name_no_machine_and_hold_no_tree():
    kept = for_the_record({"calibration": f"cached in {Path.home()}/.cache/x", "forwards": 3, "tree": {"nodes": [], "left_out": 0}})
    assert kept == {"calibration": "cached in ~/.cache/x", "forwards": 3}
