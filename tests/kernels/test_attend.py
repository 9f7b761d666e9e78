"""attend against torch's scaled_dot_product_attention in float64."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from oscar_radix.kernels.attend import attend

SIZES = [(1, 1), (1, 33), (3, 7), (17, 100), (5, 129)]


def random_case(tokens: int, keys: int, kv_heads: int, group: int, dim: int):
    generator = torch.Generator().manual_seed(tokens * 1000 + keys)
    query = torch.randn(tokens, kv_heads * group, dim, generator=generator)
    return query, torch.randn(kv_heads, keys, dim, generator=generator), torch.randn(kv_heads, keys, dim, generator=generator)


def reference(query, key, value, scale, mask=None):
    """out and lse in float64; mask broadcasts over [Hq, Tq, Tk]."""
    group = query.shape[1] // key.shape[0]
    q = query.double().transpose(0, 1)
    k, v = key.double().repeat_interleave(group, 0), value.double().repeat_interleave(group, 0)
    out = scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=None if mask is None else mask[None], scale=scale)[0]
    scores = q @ k.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return out.transpose(0, 1), scores.logsumexp(-1).T


def check(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize(("tokens", "keys"), SIZES)
def test_odd_sizes_and_groups(tokens, keys, group):
    case = random_case(tokens, keys, kv_heads=3, group=group, dim=24)
    check(attend(*case, 0.2), reference(*case, 0.2))


@pytest.mark.parametrize("group", [1, 3, 8])
def test_causal_mask(group):
    case = random_case(19, 19, kv_heads=2, group=group, dim=16)
    causal = torch.ones(19, 19, dtype=torch.bool).tril()
    check(attend(*case, 0.25, causal), reference(*case, 0.25, causal))


@pytest.mark.parametrize("group", [1, 3, 8])
def test_mask_of_each_kv_head(group):
    """Rows of a head that are read elsewhere, at another precision."""
    case = random_case(5, 40, kv_heads=2, group=group, dim=16)
    mask = torch.rand(2, 1, 40, generator=torch.Generator().manual_seed(1)) < 0.5
    check(attend(*case, 0.25, mask), reference(*case, 0.25, mask.repeat_interleave(group, 0)))


def test_no_keys():
    query, key, value = random_case(3, 0, kv_heads=2, group=2, dim=16)
    out, lse = attend(query, key, value, 0.25)
    assert out.shape == (3, 4, 16)
    assert not out.any()
    assert torch.isneginf(lse).all()


def test_everything_masked_is_no_keys():
    case = random_case(3, 5, kv_heads=2, group=2, dim=16)
    mask = torch.ones(2, 1, 5, dtype=torch.bool)
    mask[1] = False
    out, lse = attend(*case, 0.25, mask)
    assert not out[:, 2:].any()
    assert torch.isneginf(lse[:, 2:]).all()
    assert torch.isfinite(lse[:, :2]).all()


def test_large_scores_do_not_overflow():
    query, key, value = random_case(2, 9, kv_heads=1, group=2, dim=16)
    case = query * 300, key * 300, value
    check(attend(*case, 1.0), reference(*case, 1.0))
