"""Streaming sums: the moments of the whole, whatever the chunks, without the bad rows."""

import pytest
import torch

from oscar_radix.calibration.damage import damage
from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.codec import CalibrationError
from oscar_radix.geometry import Geometry

from .conftest import rows


def fill(geometry, *chunks):
    accumulator = MomentAccumulator(geometry)
    for q, k, v in chunks:
        for layer in range(geometry.layers):
            accumulator.add(layer, q, k, v)
    return accumulator


def test_against_the_definitions(geometry):
    q, k, v = rows(geometry, 600)
    moments = fill(geometry, (q, k, v)).finish()
    head, group = 1, geometry.group
    kh, vh = k[:, head].double(), v[:, head].double()
    qh = q[:, head * group : (head + 1) * group].double().reshape(-1, 64)
    c_q = qh.mT @ qh / len(qh)
    weight = torch.einsum("td,de,te->t", kh, c_q, kh)
    weight = weight / weight.mean()
    assert moments.tokens == 600
    torch.testing.assert_close(moments.key_mean[0, head], kh.mean(0))
    torch.testing.assert_close(moments.key_covariance[0, head], kh.mT.cov(correction=0))
    torch.testing.assert_close(moments.query_second[0, head], c_q)
    found = damage(q[:, head * group : (head + 1) * group].transpose(0, 1), k[:, head], v[:, head], 64**-0.5)
    of_query, of_key = found.queries.T.reshape(-1, 1).double(), found.keys.unsqueeze(-1).double()
    torch.testing.assert_close(moments.query_damage_second[0, head], (qh * of_query).mT @ qh / of_query.sum())
    torch.testing.assert_close(moments.logit_damage[0, head], of_query.sum() / found.count / 64)
    torch.testing.assert_close(moments.value_damage[0, head], found.values.double() / found.count)
    torch.testing.assert_close(moments.output_energy[0, head], found.outputs.double() / found.count)
    torch.testing.assert_close(moments.key_damage_mean[0, head], (kh * of_key).sum(0) / of_key.sum())
    torch.testing.assert_close(moments.value_weighted_second[0, head], (vh * weight[:, None]).mT @ vh / 600)
    centred = vh - vh.mean(0)
    torch.testing.assert_close(moments.value_weighted_covariance[0, head], (centred * weight[:, None]).mT @ centred / 600)


def test_weights_by_hand():
    # Two tokens, head dim 64 with only the first two channels in use. Queries (1, 0) and (0, 2): C_Q = diag(1, 4)/2.
    # Keys (2, 0) and (0, 1): w = 2, 2, so both weigh 1. With keys (2, 0) and (0, 3): w = 2, 18, of mean 10: .2 and 1.8.
    geometry = Geometry(layers=1, kv_heads=1, query_heads=1, head_dim=64)

    def row(a, b):
        return torch.nn.functional.pad(torch.tensor([[a, b]]), (0, 62)).unsqueeze(0)

    q = torch.cat((row(1.0, 0.0), row(0.0, 2.0)))
    v = torch.cat((row(1.0, 0.0), row(0.0, 1.0)))
    for keys, expected in (((2.0, 1.0), [1.0, 1.0]), ((2.0, 3.0), [0.2, 1.8])):
        accumulator = fill(geometry, (q, torch.cat((row(keys[0], 0.0), row(0.0, keys[1]))), v))
        assert torch.diagonal(accumulator._sums["wvv"][0, 0])[:2].tolist() == pytest.approx(expected)


def test_merge_is_the_same_as_one_pass(geometry):
    first, second = rows(geometry, 400, seed=1), rows(geometry, 300, seed=2)
    merged = fill(geometry, first)
    merged.merge(fill(geometry, second))
    whole = fill(geometry, first, second)
    assert merged.tokens == whole.tokens == 700
    for name, total in whole._sums.items():
        torch.testing.assert_close(merged._sums[name], total)
    with pytest.raises(ValueError, match="cannot merge"):
        merged.merge(MomentAccumulator(Geometry(1, 4, 8, 64)))


def test_bad_rows_are_skipped_and_counted(geometry):
    q, k, v = rows(geometry, 600)
    bad_k, bad_v, bad_q = k.clone(), v.clone(), q.clone()
    bad_k[5, 1, 0], bad_v[9, 1, 3], bad_q[7, 0, 0] = torch.nan, torch.inf, -torch.inf
    accumulator = fill(geometry, (bad_q, bad_k, bad_v))
    moments = accumulator.finish()
    assert accumulator.skipped_rows == moments.skipped_rows == 3 * geometry.layers
    keep = [t for t in range(600) if t not in (5, 9)]
    torch.testing.assert_close(moments.key_mean[0, 1], k[keep, 1].double().mean(0))
    torch.testing.assert_close(moments.key_mean[0, 2], k[:, 2].double().mean(0))
    assert bool(torch.isfinite(moments.value_weighted_second).all())


def test_sequences_that_are_too_short_for_damage_count_alike(geometry):
    q, k, v = rows(geometry, 600)
    moments = fill(geometry, *((q[at : at + 100], k[at : at + 100], v[at : at + 100]) for at in range(0, 600, 100))).finish()
    assert torch.equal(moments.query_damage_second, moments.query_second)
    assert torch.equal(moments.key_damage_mean, moments.key_mean)


def test_too_few_tokens_names_both_numbers(geometry):
    with pytest.raises(CalibrationError, match=r"saw 100 usable tokens.*at least 512"):
        fill(geometry, rows(geometry, 100)).finish()


def test_wrong_shapes_are_refused(geometry):
    q, k, v = rows(geometry, 10)
    with pytest.raises(ValueError, match="must be"):
        MomentAccumulator(geometry).add(0, k, q, v)
