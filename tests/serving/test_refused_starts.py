"""A server that cannot work does not come up: it ends with a message and never listens."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.servers import CPU_ARGS, ServerError, SglangServer, free_port
from oscar_radix.calibration.file import save_calibration
from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.codec import DEFAULT_RECIPE, get_recipe
from oscar_radix.model import prepare
from tests.helpers import GEOMETRY, random_qkv
from tests.serving.client import OSCAR_ARGS


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--page-size", "16"], "--page-size 16: a page is sealed as 32 tokens; drop the flag or set --page-size 32"),
        (["--oscar-recent-tokens", "100"], "--oscar-recent-tokens 100 must be a multiple of the page size 32"),
    ],
)
def test_bad_flags(extra, message):
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(prepare()), "--port", str(free_port())]
    ended = subprocess.run([*command, *CPU_ARGS, *OSCAR_ARGS, *extra], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr


def test_calibration_of_another_model(logs):
    recipe = get_recipe(DEFAULT_RECIPE)
    moments = MomentAccumulator(GEOMETRY)
    for layer in range(GEOMETRY.layers):
        moments.add(layer, *random_qkv(GEOMETRY, 1024, torch.Generator().manual_seed(layer)))
    file = logs / "another-model.safetensors"
    save_calibration(file, replace(recipe.fit(moments.finish()), model_name="another-model", model_fingerprint="0" * 32))

    server = SglangServer(prepare(), [*OSCAR_ARGS, "--oscar-calibration", str(file)], log_path=logs / "refused.log", progress=None)
    with pytest.raises(ServerError, match=r"ended with status [^0]"):
        server.__enter__()
    log = server.log_path.read_text()
    assert re.search(r"model fingerprint: the file has 0+ \(another-model\), the server needs [0-9a-f]+", log)
    assert "Uvicorn running" not in log
