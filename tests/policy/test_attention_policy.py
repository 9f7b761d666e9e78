"""Levels by mass under a budget: never above it, never up, many pages at 2 before few at 8."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oscar_radix.policy import LEVELS, AttentionPolicy
from oscar_radix.policy.attention import HYSTERESIS

MASSES = st.one_of(st.floats(0, 1e6, width=32), st.just(float("nan")))
PAGES = st.lists(st.tuples(st.sampled_from(LEVELS), MASSES), min_size=1, max_size=30)


def decide(held: list[int], mass: list[float], blocks: int, lowest: int = 0) -> list[int]:
    return AttentionPolicy().levels(np.array(held), np.array(mass, dtype=np.float32), blocks, lowest).tolist()


@given(pages=PAGES, blocks=st.integers(0, 130), lowest=st.sampled_from([0, 2]))
def test_the_budget_holds_and_nothing_rises(pages, blocks, lowest):
    held, mass = (list(column) for column in zip(*pages, strict=True))
    levels = decide(held, mass, blocks, lowest)
    assert levels == decide(held, mass, blocks, lowest), "two instances decide alike"
    assert all(level <= min(8, before) and level in LEVELS for level, before in zip(levels, held, strict=True))
    kept = [min(lowest, before) for before in held]
    assert all(level >= least for level, least in zip(levels, kept, strict=True))
    assert sum(levels) // 2 <= max(blocks, sum(kept) // 2)
    room = sum(min(8, before) for before in held) // 2
    if blocks >= room:
        assert levels == [min(8, before) for before in held], "with room for all, nobody falls"
    else:
        assert sum(levels) // 2 >= blocks - 1, "no block is idle but for half a step"


@given(mass=st.lists(st.floats(1, 100), min_size=2, max_size=30), blocks=st.integers(0, 120))
def test_colder_pages_hold_no_more_rows(mass, blocks):
    levels = decide([32] * len(mass), mass, blocks)
    order = np.argsort(np.float32(mass), kind="stable")
    colder = np.diff(np.float32(mass)[order]) > 0
    assert (np.diff(np.array(levels)[order])[colder] >= 0).all()


def test_many_pages_at_two_before_few_at_eight():
    assert decide([32] * 6, [6, 5, 4, 3, 2, 1], 6) == [2] * 6
    assert decide([32] * 6, [6, 5, 4, 3, 2, 1], 8) == [4, 4, 2, 2, 2, 2]
    assert decide([32] * 6, [6, 5, 4, 3, 2, 1], 3) == [2, 2, 2, 0, 0, 0]


def test_pages_rise_only_as_far_as_they_reach_and_newcomers_need_more_mass():
    levels = AttentionPolicy().levels(np.array([0, 0, 2, 4]), np.array([60.0, 60.0, 1.0, 1.0]), 5, reach=np.array([8, 0, 2, 4]))
    assert levels.tolist() == [8, 0, 2, 0], "the page that can rise takes the blocks of the coldest"
    same = AttentionPolicy().levels(np.array([0, 2]), np.array([1.2, 1.0]), 1, reach=np.array([8, 2]))
    assert same.tolist() == [0, 2]


def test_a_page_a_hundred_times_hotter_takes_more():
    assert decide([32] * 3, [100, 1, 1], 4) == [8, 0, 0]
    assert decide([32] * 3, [20, 1, 1], 4) == [4, 2, 2]


def test_falling_goes_over_four_and_two():
    """Eight pages at 8 lose one block after another: the coldest falls first, and the last two rows go last."""
    mass = [1.7, 1.6, 1.5, 1.4, 1.3, 1.2, 1.1, 1]
    assert decide([8] * 8, mass, 30) == [8] * 7 + [4]
    assert decide([8] * 8, mass, 16) == [4] * 8
    assert decide([8] * 8, mass, 8) == [2] * 8
    assert decide([8] * 8, mass, 5) == [2] * 5 + [0] * 3


def test_newcomers_need_more_mass_than_those_that_hold_rows():
    assert decide([2, 32], [10, 10 * HYSTERESIS - 1], 1) == [2, 0]
    assert decide([2, 32], [10, 10 * HYSTERESIS + 1], 1) == [0, 2]


def test_unknown_mass_is_the_mean_of_the_known():
    nan = float("nan")
    assert decide([32] * 3, [9, nan, 1], 2) == [2, 2, 0]
    assert decide([32] * 3, [nan, nan, nan], 2) == [2, 2, 0], "none is known: the lower index first"


@pytest.mark.parametrize("blocks", [0, 3])
def test_nobody_falls_below_the_lowest_level(blocks):
    assert decide([8, 4, 2, 0], [4, 3, 2, 1], blocks, lowest=2) == [2, 2, 2, 0]


def test_the_lowest_level_can_differ_by_page():
    levels = AttentionPolicy().levels(np.array([8, 8, 4]), np.array([1.0, 9.0, 5.0]), 0, np.array([8, 2, 8]))
    assert levels.tolist() == [8, 2, 4]
