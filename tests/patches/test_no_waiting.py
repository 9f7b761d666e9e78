"""No step waits for the device. Without a GPU its tensors are on torch's `meta` device, which has shapes and no data: reading any of it
fails. On a GPU torch itself reports whatever waits."""

from collections.abc import Iterator

import pytest
import torch

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.patches.host_pages import pages_of
from tests.helpers import make_store
from tests.mini_server import TINY, MiniServer, tokens_of

GPU = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])


@pytest.fixture(params=["meta", GPU])
def server(request) -> Iterator[MiniServer]:
    host_pages = 0 if request.param == "meta" else 30  # copies need data
    store = make_store(pages=40, hot_pages=20, policy="none", recent_tokens=64, geometry=TINY, device=request.param, host_pages=host_pages)
    yield MiniServer(store)
    if request.param == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def begin(server: MiniServer) -> None:
    """From here on a wait is an error."""
    if server.device == "cuda":
        torch.cuda.set_sync_debug_mode("error")


def test_reading_such_a_tensor_fails():
    slots = torch.zeros(64, dtype=torch.int64, device="meta")
    for read in (pages_of, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.nonzero):
        with pytest.raises((NotImplementedError, RuntimeError)):
            read(slots[:1])
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.repeat_interleave(slots, slots)


def test_a_decode_step(server):
    begin(server)
    requests = [server.start(tokens_of([1, 2, 3], tail=tail)) for tail in (3, 30, 31)]
    server.prefill([(request, request.prompt_left) for request in requests])
    for step in range(3 * PAGE_TOKENS):
        server.decode(requests, [step] * 3)
    assert server.store.hot.free_blocks < server.store.hot.capacity
    assert server.store.residency.demotions > 0, "windows have moved"
    assert server.store.requests.decode_rows_read_back == 0


@pytest.mark.parametrize("device", [GPU])
def test_decisions_by_attention_mass(device):
    """Sums of mass come to the host without a wait; decisions, settling and lowering by them, copies and their return, too."""
    sizes = {"pages": 60, "hot_pages": 20, "recent_tokens": 64, "policy_interval": 8, "host_pages": 40}
    store = make_store(policy="attention", geometry=TINY, device=device, **sizes)
    server = MiniServer(store)
    begin(server)
    requests = [server.start(tokens_of([1, 2, 3], tail=tail)) for tail in (3, 30, 31)]
    server.prefill([(request, request.prompt_left) for request in requests])
    for step in range(5 * PAGE_TOKENS):
        server.decode(requests, [step] * 3)
    torch.cuda.set_sync_debug_mode("default")
    assert store.residency.demotions > 0
    assert store.copies.host.copied > 0


def test_a_whole_conversation(server):
    """Hits, chunks, duplicates, generation into the tree, retraction, eviction."""
    begin(server)
    for user in range(12):
        prompt = tokens_of([1, 2, 3, 4, 10 + user], tail=20 + user)
        request = server.start(prompt)
        while request.prompt_left > 0:
            server.prefill([(request, min(70, request.prompt_left))])
            server.end_of_prefill([request])
        for step in range(40):
            server.decode([request], [step])
        server.finish(request, insert=user % 4 != 3)
    twins = [server.start(tokens_of([7, 8], tail=5)) for _ in range(2)]
    server.prefill([(twin, twin.prompt_left) for twin in twins])
    server.end_of_prefill(twins)
    requests = server.store.requests
    assert (requests.decode_rows_read_back, requests.prefill_rows_read_back) == (0, 0)
    assert server.tree.evictable_size() // PAGE_TOKENS < 12 * 3, "the tree was evicted from on the way"
