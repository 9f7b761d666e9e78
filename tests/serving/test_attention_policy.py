"""A server under `--oscar-policy attention`: nothing is lost under load, and a hit reads nearer to bf16 than under policy `none`."""

from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.servers import SglangServer
from tests.serving import quality
from tests.serving.client import OSCAR_ARGS, flush, serve, settled
from tests.serving.workload import converse

PARTS = 3
"""Of quality.parts()."""


@pytest.fixture(scope="module")
def attention(logs) -> Iterator[SglangServer]:
    """Our server under the policy, deciding every 16 forwards, so that there are decisions in a short test."""
    with serve("attention", [*OSCAR_ARGS, "--oscar-policy", "attention", "--oscar-policy-interval", "16"], logs) as server:
        yield server


def test_conversations_leave_everything_in_order(attention, logs):
    """Concurrent multi-turn conversations, more of them than the tree and the hot pool hold."""
    flush(attention)
    converse(attention, logs)
    report = settled(attention)
    print(f"levels {report['levels']}, demotions {report['demotions_by_level']}, mass {report['mass']}")
    assert report["policy"] == "attention"
    assert 0 < report["allocated_bytes"]["mass"] < 0.15 * report["allocated_bytes"]["hot_pool"]
    assert sum(report["allocated_bytes"].values()) <= report["kv_budget_bytes"]
    assert sum(report["levels"][level]["tokens"] for level in ("2", "4", "8")) > 0
    assert report["demotions_by_level"]["8"] > 0
    assert 0.5 < report["mass"]["covered_share"] <= 1


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
    bits = [server.kv_quant()["effective_bits"] for server in (running, attention)]
    print(f"KL none {none.mean():.5f} at {bits[0]:.3f} bits, attention {ours.mean():.5f} at {bits[1]:.3f} bits")
    print(f"per prefix {none.round(4)}, {ours.round(4)}")
    assert bits[1] == pytest.approx(bits[0], rel=0.01)
    assert ours.mean() <= none.mean()
