"""Three tensor-parallel ranks, one KV head each: they answer like one rank, and decide alike."""

import json
import os

import pytest
import torch

from tests.serving import client
from tests.serving.across_devices import OWN_CALIBRATION_TOLERANCE, ask, check
from tests.serving.client import OSCAR_ARGS, REPOSITORY, pages, serve, settled

RANKS = 3
"""The model's KV heads."""
PARTS, POSITIONS = 1, 12
"""Of the reference, asked twice: three ranks on two cores are slow."""
REFERENCE = REPOSITORY / "tests" / "serving" / "cpu_reference.json"


def one_core_a_rank() -> dict[str, str]:
    """SGLang's own switches for several ranks on a CPU of one NUMA node, which must not take the NCCL of a CUDA torch for theirs."""
    cores = sorted(os.sched_getaffinity(0))
    return {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(str(cores[rank % len(cores)]) for rank in range(RANKS)), "SGLANG_NCCL_SO_PATH": "none"}


def test_ranks_answer_like_one_and_decide_alike(logs):
    """Policy `attention`, whose decisions go by the mass of all ranks' heads."""
    if client.on_gpu and torch.cuda.device_count() < RANKS:
        pytest.skip(f"{RANKS} GPUs are needed, there are {torch.cuda.device_count()}")
    policy = ("--oscar-policy", "attention", "--oscar-policy-interval", "8", "--oscar-host-gib", "0.1")
    flags = [*OSCAR_ARGS, *policy, "--tp-size", str(RANKS)]
    reference = json.loads(REFERENCE.read_text())
    parts = [{**part, "forced": part["forced"][:POSITIONS]} for part in reference["parts"][:PARTS]]
    with serve("three-ranks", flags, logs, environment={} if client.on_gpu else one_core_a_rank()) as server:
        answers = ask(server, parts, logs)
        report = settled(server)
    print(f"demotions {report['demotions_by_level']}, mass {report['mass']}")
    assert report["demotions_by_level"]["8"] > 0
    assert report["host_store"]["pages_copied"] > 0
    assert 0.5 < report["mass"]["covered_share"] <= 1
    assert [answer["cached_tokens"] for answer in answers] == [0, pages(len(parts[0]["prompt"]) - 1)]
    print(check(answers, reference, OWN_CALIBRATION_TOLERANCE, same_hits=False))
