"""The weight of a query: first-order damage of independent errors of the keys that are 2 bits when it reads them."""

import pytest
import torch

from oscar_radix.calibration.damage import BLOCK, NEAREST, SINKS, damage


def drawn(tokens: int, group: int, dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*shape, dim, generator=draw) for shape in ((group, tokens), (tokens,), (tokens,)))


def by_definition(q, k, v, scale):
    of_query, of_key, values, outputs = torch.zeros(q.shape[:2]), torch.zeros(len(k)), 0.0, 0.0
    for t in range(len(k)):
        p = (q[:, t] @ k[: t + 1].T * scale).softmax(-1)
        o = p @ v[: t + 1]
        for i in range(SINKS, t - NEAREST + 1):
            moved = p[:, i] ** 2 * (v[i] - o).square().sum(-1)
            of_query[:, t] += moved
            of_key[i] += moved.sum()
            values += float((p[:, i] ** 2 * v[i].square().sum()).sum())
        outputs += float(o.square().sum()) if t >= SINKS + NEAREST else 0.0
    return of_query, of_key, torch.tensor(values), torch.tensor(outputs)


@pytest.mark.parametrize("tokens", [SINKS + NEAREST - 1, SINKS + NEAREST + 1, SINKS + NEAREST + BLOCK, SINKS + NEAREST + BLOCK + 9])
def test_against_the_definition(tokens):
    q, k, v = drawn(tokens, 2, 8)
    found = damage(q, k, v, 0.4)
    assert found.count == 2 * max(0, tokens - SINKS - NEAREST)
    for got, expected in zip((found.queries, found.keys, found.values, found.outputs), by_definition(q, k, v, 0.4), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_predicts_what_errors_of_keys_do():
    q, k, v = drawn(200, 1, 16)
    draw, moved = torch.Generator().manual_seed(3), []
    counted = torch.zeros(200, 1)
    counted[SINKS : 200 - NEAREST] = 1

    def out(scores):
        return scores.softmax(-1) @ v

    scores = (q[0, -1:] @ k.T) * 0.25
    for _ in range(4000):
        moved.append((out(scores + 0.01 * torch.randn(1, 200, generator=draw) * counted.T) - out(scores)).square().sum())
    assert float(torch.stack(moved).mean()) == pytest.approx(0.01**2 * float(damage(q, k, v, 0.25).queries[0, -1]), rel=0.1)


def test_nothing_counts_where_everything_is_int8():
    found = damage(*drawn(SINKS + NEAREST, 2, 8), 1.0)
    assert not found.queries.any()
    assert not found.keys.any()
    assert found.values == found.outputs == found.count == 0


def test_a_query_that_rests_on_a_sink_does_not_count():
    q, k, v = drawn(256, 1, 8)
    k[0], q[0, -1] = torch.tensor([9.0] + [0.0] * 7), torch.tensor([9.0] + [0.0] * 7)
    weights = damage(q, k, v, 1.0).queries
    assert weights[0, -1] < 1e-9 < weights[0, 200]
