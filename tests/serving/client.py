"""What the serving tests share: how servers are started, token material, concurrent requests, and questions to a server."""

import contextlib
import heapq
import inspect
import os
import random
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import requests
from transformers import AutoTokenizer

from benchmarks.servers import CPU_ENVIRONMENT, SglangServer
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.model import prepare

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_TEXTS = REPOSITORY / "benchmarks" / "demo" / "texts"

NO_PLUGIN = "no-such-plugin"
"""Name for SGLang's own SGLANG_PLUGINS switch: only plugins of this name are loaded, so none."""

WINDOW = 256
"""The default recent window."""

BUDGET_TOKENS = 1500
"""--max-total-tokens of our servers: 34.6 MB, of which a little under half holds rows of about 1,280 tokens at int8."""

COMMON_ARGS = ("--chunked-prefill-size", "256", "--max-running-requests", "16", "--enable-custom-logit-processor")
OSCAR_ARGS = (
    *COMMON_ARGS,
    *("--max-total-tokens", str(BUDGET_TOKENS), "--kv-quant", "oscar", "--oscar-policy", "none", "--oscar-hot-fraction", "0.45"),
    *("--schedule-conservativeness", "0.1"),
)

GPU_ARGS = (
    *("--dtype", "bfloat16", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--enable-cache-report"),
    *("--skip-server-warmup", "--disable-prefill-cuda-graph"),
)
"""In place of CPU_ARGS: with decode CUDA graphs and overlap scheduling."""

on_gpu = False
"""Whether servers run on the GPU: pytest --on-gpu."""


@contextlib.contextmanager
def serve(
    name: str, arguments: Iterable[str], logs: Path, plugins: str | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[SglangServer]:
    """A server on the embedded model; its processes find the tests' modules. `plugins` restricts what SGLang loads, `environment` is set on
    top."""
    changed = {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])}
    if plugins is not None:
        changed["SGLANG_PLUGINS"] = plugins
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    try:
        where: dict[str, Any] = {"base_args": GPU_ARGS, "threads": None} if on_gpu else {"threads": 1}
        where["environment"] = {**({"HF_HUB_OFFLINE": "1"} if on_gpu else CPU_ENVIRONMENT), **(environment or {})}
        server = SglangServer(prepare(), arguments, log_path=logs / f"{name}.log", name=name, progress=None, stop_grace_s=1.0, **where)
        server.__enter__()
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)
    try:
        yield server
    finally:
        server.stop()


# Token material ------------------------------------------------------------------------------------------------------------------


@lru_cache
def _tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(prepare())


@lru_cache
def texts() -> tuple[tuple[int, ...], ...]:
    """Eight texts as token ids, none of them in the calibration text: tool descriptions, prose and code of Python's own library."""
    modules = (heapq, textwrap, statistics, random, contextlib, inspect)
    sources = [(DEMO_TEXTS / name).read_text() for name in ("travel.txt", "cluster.txt")]
    sources += [inspect.getsource(module)[:12000] for module in modules]
    return tuple(tuple(_tokenizer().encode(source)) for source in sources)


def piece(length: int, seed: int) -> list[int]:
    """`length` consecutive tokens of one of the texts, at a place that depends on `seed`."""
    text = texts()[seed % len(texts())]
    start = random.Random(seed).randrange(len(text) - length)
    return list(text[start : start + length])


def pages(tokens: int) -> int:
    """`tokens` rounded down to whole pages, in tokens."""
    return tokens // PAGE_TOKENS * PAGE_TOKENS


# Requests ------------------------------------------------------------------------------------------------------------------------


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of all calls, made at the same time; the first error is raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(lambda call: call(), calls))


def cached(answer: dict) -> int:
    """Prompt tokens of an answer that came out of the cache."""
    return answer["meta_info"]["cached_tokens"]


def load(server: SglangServer) -> dict:
    """SGLang's own load report of the only rank: `num_running_reqs`, `num_used_tokens`, `token_usage` and more."""
    response = requests.get(f"{server.url}/v1/loads", params={"include": "core"}, timeout=60)
    response.raise_for_status()
    return response.json()["loads"][0]


def computed(tokens: int) -> int:
    """Of the tokens of a prompt and its answer those that were computed: all but the last; with overlap scheduling the last one, too,
    since its step was under way when the request turned out to have ended."""
    return tokens if on_gpu else tokens - 1


def flush(server: SglangServer) -> None:
    """Empty the cache as soon as nothing runs: the scheduler is busy a moment longer than the last answer takes to come back."""
    requests.post(f"{server.url}/flush_cache", params={"timeout": 30}, timeout=60).raise_for_status()


def settled(server: SglangServer, timeout_s: float = 60.0) -> dict:
    """Wait until nothing runs or waits, then longer than SGLang's idle memory check takes; returns the `kv_quant` report.

    Raises:
        AssertionError: requests still run after `timeout_s`, the server died of a failed check, tokens are still in use, our own
            integrity check fails, or pages had to be read from the device.
    """
    deadline = time.monotonic() + timeout_s
    while (now := load(server))["num_running_reqs"] + now["num_waiting_reqs"]:
        assert time.monotonic() < deadline, f"still busy after {timeout_s:.0f} s: {now}"
        time.sleep(0.2)
    time.sleep(1.0)
    assert server.alive(), server.log_tail()
    assert load(server)["num_used_tokens"] == 0
    report = server.kv_quant()
    assert report["integrity"] == "ok"
    assert report["rows_read_from_device"] == {"decode": 0, "prefill": 0}
    return report


def log_text(server: SglangServer) -> str:
    """Everything the server has printed so far."""
    return server.log_path.read_text(errors="replace")
