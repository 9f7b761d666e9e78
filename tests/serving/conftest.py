"""Servers of this folder. Each takes half a minute to start, so all tests share them, and the ones that are only compared with
are asked everything at once and stopped: there is one busy server at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from benchmarks.servers import SglangServer
from tests.serving import client, quality
from tests.serving.client import COMMON_ARGS, NO_PLUGIN, OSCAR_ARGS, flush, piece, serve
from tests.serving.workload import Turn, converse

BF16_ARGS = (*COMMON_ARGS, "--max-total-tokens", "4096", "--mem-fraction-static", "0.5")
"""The fraction is given because SGLang's default depends on what else runs on the machine."""


@dataclass(frozen=True)
class Behaviour:
    """What a client can see of a bf16 server: its settings, and full answers to a few requests."""

    info: dict
    answers: list[dict]


@dataclass(frozen=True)
class Stock:
    """`behaviour` of stock SGLang, and `predictions` of quality.parts(): float32 [64, vocabulary] log-probabilities."""

    behaviour: Behaviour
    predictions: list[np.ndarray]


def pytest_configure(config: pytest.Config) -> None:
    """Where `client.serve` starts servers."""
    client.on_gpu = config.getoption("--on-gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder starts servers."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.serving)


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where servers' output goes; also scratch space."""
    return tmp_path_factory.mktemp("serving")


@pytest.fixture(scope="session")
def stock(logs: Path) -> Stock:
    """SGLang without the plugin; stopped when this fixture returns."""
    # Its default backend on Hopper, FA3, comes in a wheel of its own, which a GPU host may lack.
    backend = ["--attention-backend", "triton"] if client.on_gpu else []
    with serve("stock", [*BF16_ARGS, *backend], logs, plugins=NO_PLUGIN) as server:
        behaviour = observe(server)
        predictions = [quality.predictions(server, part, logs)[1] for part in quality.parts()]
    return Stock(behaviour, predictions)


@pytest.fixture(scope="session")
def kv_quant_none(logs: Path) -> Behaviour:
    """The plugin installed and told to do nothing; stopped when this fixture returns."""
    with serve("kv-quant-none", [*BF16_ARGS, "--kv-quant", "none"], logs) as server:
        return observe(server)


@pytest.fixture(scope="session")
def cache_off(logs: Path) -> list[list[Turn]]:
    """The concurrent conversations on our server without a radix cache; stopped when this fixture returns."""
    with serve("cache-off", [*OSCAR_ARGS, "--disable-radix-cache"], logs) as server:
        return converse(server, logs)


@pytest.fixture(scope="session")
def running(logs: Path) -> Iterator[SglangServer]:
    """Our server, for all tests."""
    with serve("oscar", OSCAR_ARGS, logs) as server:
        yield server


@pytest.fixture
def ours(running: SglangServer) -> SglangServer:
    """Our server with an empty cache."""
    flush(running)
    return running


def observe(server: SglangServer) -> Behaviour:
    """A prompt, its repetition, and a continuation, with every log-probability."""
    first = piece(150, seed=1)
    answers = [
        server.generate(ids, 12, return_logprob=True, top_logprobs_num=5, logprob_start_len=start)
        for ids, start in ((first, 0), (first, -1), (first + piece(40, seed=2), -1), (piece(300, seed=3), 0))
    ]
    return Behaviour(server.server_info(), answers)
