"""What the policies decide, and that they decide alike on every rank."""

import numpy as np
import pytest
import torch

from oscar_radix.policy import LEVELS, POLICIES, AttentionPolicy, NonePolicy, RandomPolicy, WindowPolicy

PAGES = np.array([5, 9, 2])


def test_policies_by_name():
    assert sorted(POLICIES) == ["attention", "none", "random", "window"]
    for name, policy in POLICIES.items():
        assert policy.name == name


@pytest.mark.parametrize(("policy", "level"), [(WindowPolicy, 32), (NonePolicy, 0), (RandomPolicy, 2), (AttentionPolicy, 8)])
def test_level_of_pages_that_no_window_needs(policy, level):
    assert policy().settle(PAGES) == level
    assert level in LEVELS


@pytest.mark.parametrize("policy", [WindowPolicy, NonePolicy, RandomPolicy])
def test_only_one_policy_goes_by_mass(policy):
    assert not policy.by_mass
    with pytest.raises(NotImplementedError, match=f"policy {policy.name} does not go by attention mass"):
        policy().levels(PAGES, np.ones(3), 10)


@pytest.mark.parametrize("policy", [WindowPolicy, NonePolicy])
def test_whole_page_policies_choose_no_rows(policy):
    with pytest.raises(NotImplementedError, match="keeps whole pages or none; it never chooses 4 rows"):
        policy().choose_rows(1, 4, 2, 3, 32)


@pytest.mark.parametrize("level", [2, 4, 8])
def test_random_rows_are_distinct_and_ascending(level):
    rows = RandomPolicy().choose_rows(page=1, level=level, layers=4, kv_heads=3, page_tokens=32)
    assert rows.shape == (4, 3, level)
    assert (rows.diff(dim=-1) > 0).all()
    assert rows.min() >= 0
    assert rows.max() < 32


def test_random_rows_differ_by_head_and_by_draw():
    policy = RandomPolicy()
    first, second = (policy.choose_rows(1, 8, 4, 3, 32) for _ in range(2))
    assert not torch.equal(first, second)
    assert len({tuple(head.tolist()) for head in first.flatten(0, 1)}) == 12


def test_random_rows_are_the_same_on_every_rank():
    one, other = RandomPolicy(), RandomPolicy()
    for page in (3, 1, 7):
        assert torch.equal(one.choose_rows(page, 2, 2, 2, 32), other.choose_rows(page, 2, 2, 2, 32))


def test_random_rows_are_uniform():
    policy = RandomPolicy()
    rows = torch.cat([policy.choose_rows(page, 2, 10, 10, 32).flatten() for page in range(20)])
    counts = torch.bincount(rows, minlength=32)
    assert counts.sum() == 4000
    assert counts.min() > 80, "125 expected"
    assert counts.max() < 180


@pytest.mark.parametrize("policy", list(POLICIES.values()))
def test_least_recently_used_goes_first_then_the_start_of_the_sequence(policy):
    pages = np.array([10, 11, 12, 13, 14])
    last_use = np.array([7, 3, 7, 3, 3])
    position = np.array([0, 5, 1, 2, 2])
    order = policy().demotion_order(pages, last_use, position)
    assert pages[order].tolist() == [13, 14, 11, 10, 12]
