"""Decode and extend kernels on tiny sizes in Triton's interpreter, in a process of its own: it changes Triton for good."""

import os
import subprocess
import sys


def test_kernels_do_what_their_specifications_do():
    command = [sys.executable, "-m", "tests.kernels.attention_cases"]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.endswith("done\n")
