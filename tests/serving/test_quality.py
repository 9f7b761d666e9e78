"""Quality after a prefix hit is quality without one."""

import numpy as np
import pytest

from benchmarks.servers import SglangServer
from tests.serving import quality
from tests.serving.client import flush, together

ALLOWED_RATIO = 1.10
"""Measured .995 with a standard error of .03."""

ALLOWED_UNDER_PRESSURE = 2.0
"""Four windows of 256 tokens and their sinks ask for 44 hot pages; the server has 39. Measured 1.3; 9 if sinks gave way first."""

AT_ONCE = 4


@pytest.fixture(scope="module")
def computed(stock, running: SglangServer, logs) -> list[float]:
    """Mean KL of each part when the request itself computes the prefix."""
    result = []
    for part, expected in zip(quality.parts(), stock.predictions, strict=True):
        flush(running)
        hit_tokens, log_p = quality.predictions(running, part, logs)
        assert hit_tokens == 0
        result.append(quality.kl(expected, log_p).mean())
    return result


def test_kl_after_a_hit_is_that_of_a_computed_prefix(stock, computed, running, logs):
    """Mean KL to bf16 of decoded tokens, over all prefixes; policy `none`, so that both sides read the same precision by design."""
    after_hit = []
    for part, expected in zip(quality.parts(), stock.predictions, strict=True):
        prefix = part[0][:-1]
        flush(running)
        running.generate(prefix, 1)
        hit_tokens, log_p = quality.predictions(running, part, logs)
        assert hit_tokens == len(prefix)
        after_hit.append(quality.kl(expected, log_p).mean())
    difference = np.array(after_hit) - np.array(computed)
    error = difference.std(ddof=1) / np.sqrt(len(difference))
    ratio = np.mean(after_hit) / np.mean(computed)
    print(f"KL computed {np.mean(computed):.5f}, after a hit {np.mean(after_hit):.5f}: ratio {ratio:.3f}")
    print(f"difference {difference.mean():+.5f}, standard error {error:.5f}; per prefix {np.round(difference, 5)}")
    assert ratio <= ALLOWED_RATIO


def test_a_full_hot_pool_degrades_gracefully(stock, computed, running, logs):
    """Four requests at once whose windows and sinks do not all fit: mean KL stays near that of one request at a time."""
    parts = quality.parts()[:AT_ONCE]
    flush(running)
    calls = [lambda part=part, number=number: quality.predictions(running, part, logs / f"{number}") for number, part in enumerate(parts)]
    crowded = [
        quality.kl(expected, log_p).mean() for expected, (_, log_p) in zip(stock.predictions[:AT_ONCE], together(calls), strict=True)
    ]
    alone = computed[:AT_ONCE]
    ratio = np.mean(crowded) / np.mean(alone)
    print(f"KL four at once {np.mean(crowded):.5f}, alone {np.mean(alone):.5f}: ratio {ratio:.2f}")
    print(f"per prefix {np.round(crowded, 4)}, alone {np.round(alone, 4)}")
    assert ratio <= ALLOWED_UNDER_PRESSURE
