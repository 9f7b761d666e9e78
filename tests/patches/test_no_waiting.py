"""No step waits for the device. Its tensors are on torch's `meta` device here, which has shapes and no data: reading any of it fails."""

import pytest
import torch

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.patches.host_pages import pages_of
from tests.helpers import make_store
from tests.mini_server import TINY, MiniServer, tokens_of


@pytest.fixture
def server() -> MiniServer:
    return MiniServer(make_store(pages=40, hot_pages=20, policy="none", recent_tokens=64, geometry=TINY, device="meta"))


def test_reading_such_a_tensor_fails():
    slots = torch.zeros(64, dtype=torch.int64, device="meta")
    for read in (pages_of, torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.nonzero):
        with pytest.raises((NotImplementedError, RuntimeError)):
            read(slots[:1])
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.repeat_interleave(slots, slots)


def test_a_decode_step(server):
    requests = [server.start(tokens_of([1, 2, 3], tail=tail)) for tail in (3, 30, 31)]
    server.prefill([(request, request.prompt_left) for request in requests])
    for step in range(3 * PAGE_TOKENS):
        server.decode(requests, [step] * 3)
    assert server.store.hot.free_blocks < server.store.hot.capacity
    assert server.store.residency.demotions > 0, "windows have moved"
    assert server.store.requests.decode_rows_read_back == 0


def test_a_whole_conversation(server):
    """Hits, chunks, duplicates, generation into the tree, retraction, eviction."""
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
