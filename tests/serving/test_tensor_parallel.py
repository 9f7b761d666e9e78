"""Three tensor-parallel ranks, one KV head each: they answer like one rank, and decide alike."""

import json
import os

import pytest
import torch

from tests.serving import client
from tests.serving.across_devices import OWN_CALIBRATION_TOLERANCE, ask, check
from tests.serving.client import OSCAR_ARGS, REPOSITORY, serve, settled
from tests.serving.workload import converse

RANKS = 3
"""The model's KV heads."""
PARTS = 2
REFERENCE = REPOSITORY / "tests" / "serving" / "cpu_reference.json"


def one_core_a_rank() -> dict[str, str]:
    """SGLang's own switches for several ranks on a CPU of one NUMA node, which must not take the NCCL of a CUDA torch for theirs."""
    cores = sorted(os.sched_getaffinity(0))
    return {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(RANKS)), "SGLANG_NCCL_SO_PATH": "none"}


def test_ranks_answer_like_one_and_decide_alike(logs):
    """Policy `attention`, whose decisions go by mass of all ranks' heads; concurrent conversations bring the hot pool to its end first."""
    if client.on_gpu and torch.cuda.device_count() < RANKS:
        pytest.skip(f"{RANKS} GPUs are needed, there are {torch.cuda.device_count()}")
    policy = ("--oscar-policy", "attention", "--oscar-policy-interval", "8")
    flags = [*OSCAR_ARGS, *policy, "--tp-size", str(RANKS)]
    reference = json.loads(REFERENCE.read_text())
    with serve("three-ranks", flags, logs, environment={} if client.on_gpu else one_core_a_rank()) as server:
        converse(server, logs, waves=1)
        loaded = settled(server)
        client.flush(server)
        answers = ask(server, reference["parts"][:PARTS], logs)
        settled(server)
    print(f"demotions {loaded['demotions_by_level']}, mass {loaded['mass']}")
    assert sum(loaded["demotions_by_level"].values()) > 0
    assert 0.5 < loaded["mass"]["covered_share"] <= 1
    print(check(answers, reference, OWN_CALIBRATION_TOLERANCE))
