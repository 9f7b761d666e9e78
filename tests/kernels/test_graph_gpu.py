"""A captured decode step replays: new tokens, pages and levels behind the same addresses, without the host."""

import pytest
import torch

from oscar_radix.geometry import PAGE_TOKENS, Geometry
from tests.helpers import random_qkv
from tests.kernels.attention_cases import SCALE, sequences_of
from tests.kernels.mass_levels_cases import random_store

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GEOMETRY = Geometry(1, 4, 16, 128)


def test_replay_equals_eager():
    from oscar_radix.attention.triton_backend import DecodeBatch, TritonAttention

    store = random_store(GEOMETRY, 60, seed=5, device="cuda")
    store.codec.values_folded = False
    for page in (5, 12):  # the pages that take the new tokens
        if store.hot.levels[page]:
            store.hot.release(page)
        assert store.hot.acquire(page)
    store.hot.sync_tables()
    store.hot.scales.nan_to_num_(0.005)
    store.base.scales.nan_to_num_(0.1)
    table, _ = sequences_of(store, [5 * PAGE_TOKENS, 7 * PAGE_TOKENS], "cuda")
    attention = TritonAttention(store, max_requests=2, max_tokens=table.shape[1])
    lengths = torch.tensor([130, 200], device="cuda")
    slots = torch.tensor([table[0, 129], table[1, 199]], device="cuda").long()
    batch = DecodeBatch(table, torch.arange(2, device="cuda"), lengths, slots)
    draw = torch.Generator().manual_seed(1)
    q, k, v = (each.cuda() for each in random_qkv(GEOMETRY, 2, draw))

    attention.prepare_decode(batch)
    attention.decode(0, q, k, v, batch, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention.decode(0, q, k, v, batch, SCALE)
    for step in range(3):
        for target, new in zip((q, k, v), random_qkv(GEOMETRY, 2, draw), strict=True):
            target.copy_(new)
        lengths.add_(1)
        slots.copy_(torch.stack([table[0, 130 + step], table[1, 200 + step]]))
        attention.prepare_decode(batch)
        out.fill_(float("nan"))
        graph.replay()
        replayed = out.clone()
        eager = attention.decode(0, q, k, v, batch, SCALE)
        assert torch.equal(replayed, eager)
        assert torch.isfinite(replayed).all()
