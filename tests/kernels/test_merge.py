"""merge_states against attention over the union of the key sets."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.kernels.attend import attend
from oscar_radix.kernels.merge import merge_states

EMPTY = float("-inf")


def random_case(tokens: int, keys: int, seed: int, spread: float = 1.0):
    """query [T, 4, 16], key and value [2, K, 16]; `spread` scales the scores."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(tokens, 4, 16, generator=generator) * spread
    return query, torch.randn(2, keys, 16, generator=generator), torch.randn(2, keys, 16, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 5),
    cuts=st.lists(st.integers(0, 24), min_size=0, max_size=4),
    spread=st.sampled_from([0.01, 1.0, 20.0]),
    seed=st.integers(0, 1000),
)
def test_merged_parts_are_the_whole(tokens, cuts, spread, seed):
    """Any partition of the keys, empty parts included, merged in order."""
    query, key, value = random_case(tokens, 24, seed, spread)
    bounds = [0, *sorted(cuts), 24]
    out, lse = torch.zeros(tokens, 4, 16), torch.full((tokens, 4), EMPTY)
    for start, end in pairwise(bounds):
        out, lse = merge_states(out, lse, *attend(query, key[:, start:end], value[:, start:end], 0.25))
    whole, whole_lse = attend(query, key, value, 0.25)
    torch.testing.assert_close(out, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, whole_lse, rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_order_does_not_matter(seed):
    query, key, value = random_case(3, 20, seed)
    first, second = attend(query, key[:, :7], value[:, :7], 0.25), attend(query, key[:, 7:], value[:, 7:], 0.25)
    for one, other in zip(merge_states(*first, *second), merge_states(*second, *first), strict=True):
        torch.testing.assert_close(one, other)


def test_two_equal_weights_give_the_mean():
    out, lse = merge_states(torch.tensor([[1.0, 3.0]]), torch.zeros(1), torch.tensor([[3.0, 5.0]]), torch.zeros(1))
    assert out.tolist() == [[2.0, 4.0]]
    assert lse.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())


def test_two_empty_sets():
    out, lse = merge_states(torch.zeros(2, 3, 8), torch.full((2, 3), EMPTY), torch.ones(2, 3, 8), torch.full((2, 3), EMPTY))
    assert not out.any()
    assert torch.isneginf(lse).all()


@pytest.mark.parametrize("empty_first", [True, False])
def test_one_empty_set_changes_nothing(empty_first):
    query, key, value = random_case(3, 10, seed=0)
    state = attend(query, key, value, 0.25)
    empty = torch.full_like(state[0], 7.0), torch.full_like(state[1], EMPTY)
    out, lse = merge_states(*empty, *state) if empty_first else merge_states(*state, *empty)
    assert torch.equal(out, state[0])
    assert torch.equal(lse, state[1])


@pytest.mark.parametrize("offset", [1000.0, -1000.0])
def test_large_scores_do_not_overflow(offset):
    out, lse = merge_states(torch.ones(1, 2), torch.tensor([offset]), torch.zeros(1, 2), torch.tensor([offset]))
    assert out.tolist() == [[0.5, 0.5]]
    assert lse.item() == pytest.approx(offset + 0.6931472)
