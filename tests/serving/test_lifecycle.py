"""Flush, abort, and SGLang's own radix cache test: nothing is left behind."""

import contextlib
import random
import threading
import time

import requests
from sglang.test.kits import radix_cache_server_kit

from tests.serving.client import cached, flush, load, piece, settled


def test_sglang_radix_attention_kit(ours, monkeypatch):
    """SGLang's test of random prompt trees, with fewer and shorter nodes than its default, which takes a GPU."""
    monkeypatch.setattr(radix_cache_server_kit.gen_radix_tree, "__defaults__", (24, 96))
    random.seed(20)
    radix_cache_server_kit.run_radix_attention_test(ours.url)
    settled(ours)


def test_flush_empties_everything(ours):
    prompt = piece(500, seed=60)
    ours.generate(prompt, 20, ignore_eos=True)
    assert sum(entry["tokens"] for entry in settled(ours)["levels"].values()) == 512
    flush(ours)
    report = settled(ours)
    assert all(entry == {"tokens": 0, "bytes": 0} for entry in report["levels"].values())
    assert report["hot_blocks"]["free"] == report["hot_blocks"]["capacity"]
    assert cached(ours.generate(prompt, 1)) == 0


def test_aborted_request_leaks_nothing(ours):
    finished = []
    body = {"rid": "to-abort", "input_ids": piece(400, seed=61), "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}}
    thread = threading.Thread(target=lambda: finished.append(requests.post(f"{ours.url}/generate", json=body, timeout=300)))
    thread.start()
    _wait_until_running(ours)
    requests.post(f"{ours.url}/abort_request", json={"rid": "to-abort"}, timeout=60).raise_for_status()
    thread.join(60)
    assert finished
    assert finished[0].json()["meta_info"]["finish_reason"]["type"] == "abort"
    _empty_after_flush(ours)


def test_closed_connection_leaks_nothing(ours):
    body = {"input_ids": piece(400, seed=62), "sampling_params": {"max_new_tokens": 1500, "ignore_eos": True}, "stream": True}
    with contextlib.closing(requests.post(f"{ours.url}/generate", json=body, stream=True, timeout=300)) as response:
        assert next(response.iter_lines())
    _empty_after_flush(ours)


def _wait_until_running(server) -> None:
    deadline = time.monotonic() + 30
    while not load(server)["num_running_reqs"]:
        assert time.monotonic() < deadline, "the request does not start"
        time.sleep(0.1)


def _empty_after_flush(server) -> None:
    settled(server)
    flush(server)
    assert sum(entry["tokens"] for entry in settled(server)["levels"].values()) == 0
