"""A server under `--oscar-policy attention`: nothing is lost under load, and a hit reads nearer to bf16 than under policy `none`."""

from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.capacity import SHAPES
from benchmarks.servers import SglangServer
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.sample_storage import SampleStorage
from tests.serving import client, quality
from tests.serving.client import OSCAR_ARGS, WINDOW, cached, computed, flush, pages, piece, serve, settled
from tests.serving.workload import converse

PARTS = 3
"""Of quality.parts()."""


@pytest.fixture(scope="module")
def attention(logs) -> Iterator[SglangServer]:
    """Our server under the policy, deciding every 16 forwards, so that there are decisions in a short test; with copies in host memory."""
    flags = ("--oscar-policy", "attention", "--oscar-policy-interval", "16", "--oscar-host-gib", "0.06")
    with serve("attention", [*OSCAR_ARGS, *flags], logs) as server:
        yield server


def sampled_query_bytes(budget_bytes: int) -> int:
    """Room for sampled queries at fixed addresses, which only CUDA graphs need."""
    shape = SHAPES["SmolLM2-135M (D 64)"]
    return SampleStorage.bytes_of(shape, SampleStorage.queries_for(shape, budget_bytes)) if client.on_gpu else 0


def test_conversations_leave_everything_in_order(attention, logs):
    """Concurrent multi-turn conversations, more of them than the tree and the hot pool hold."""
    flush(attention)
    converse(attention, logs)
    report = settled(attention)
    print(f"levels {report['levels']}, demotions {report['demotions_by_level']}, mass {report['mass']}")
    assert report["policy"] == "attention"
    mass = report["allocated_bytes"]["mass"] - sampled_query_bytes(report["kv_budget_bytes"])
    assert 0 < mass < 0.15 * report["allocated_bytes"]["hot_pool"]
    assert sum(report["allocated_bytes"].values()) <= report["kv_budget_bytes"]
    assert sum(report["levels"][level]["tokens"] for level in ("2", "4", "8")) > 0
    assert report["demotions_by_level"]["8"] > 0
    assert 0.5 < report["mass"]["covered_share"] <= 1
    assert report["host_store"]["bytes"] <= 0.06 * 2**30
    assert report["host_store"]["pages_copied"] > 0
    assert report["promotions_by_source"]["host"] > 0


def test_a_hit_whose_end_left_the_hot_pool_is_whole_again(attention):
    """What test_hits.test_starved_hot_pool_costs_the_recent_window_at_most loses without copies."""
    flush(attention)
    talk = piece(400, seed=40)
    talk = talk + attention.generate(talk, 60, ignore_eos=True)["output_ids"]
    for agent in range(9):  # their last windows alone ask for more than the hot pool has
        attention.generate(piece(WINDOW + 40, seed=200 + agent), 1)
    before = attention.kv_quant()["promotions_by_level"]["32"]
    assert cached(attention.generate(talk + piece(50, seed=41), 1)) == pages(computed(len(talk)))
    assert settled(attention)["promotions_by_level"]["32"] - before >= WINDOW // PAGE_TOKENS


def test_a_hit_is_nearer_to_bf16_than_under_policy_none(stock, running, attention, logs):
    """Mean KL to bf16 of decoded tokens after a prefix was found in the cache; both servers have the same bytes."""
    means = []
    for server in (running, attention):
        parts = []
        for part, expected in list(zip(quality.parts(), stock.predictions, strict=True))[:PARTS]:
            prefix = part[0][:-1]
            flush(server)
            server.generate(prefix, 1)
            hit_tokens, log_p = quality.predictions(server, part, logs)
            assert hit_tokens == len(prefix)
            parts.append(quality.kl(expected, log_p).mean())
        means.append(np.array(parts))
    none, ours = means
    reports = [server.kv_quant() for server in (running, attention)]
    bits = [report["effective_bits"] for report in reports]
    print(f"KL none {none.mean():.5f} at {bits[0]:.3f} bits, attention {ours.mean():.5f} at {bits[1]:.3f} bits")
    print(f"per prefix {none.round(4)}, {ours.round(4)}")
    assert reports[0]["kv_budget_bytes"] == reports[1]["kv_budget_bytes"]
    # On a GPU the room for sampled queries takes tokens from a pool this small.
    assert client.on_gpu or bits[1] == pytest.approx(bits[0], rel=0.01)
    assert ours.mean() <= none.mean()
