"""Levels by attention mass in a store: the pool's budget holds, rows only go, two ranks decide alike, and the right rows stay."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.policy import LEVELS
from oscar_radix.policy.base import LAG
from oscar_radix.pool.mass_levels import HALF_LIFE
from oscar_radix.pool.store import KVStore
from tests.helpers import GEOMETRY
from tests.pool.mass_driver import Driver, Ranks


def test_with_room_pages_settle_at_eight():
    driver = Driver(hot_pages=40)
    a = driver.begin(320)
    driver.step()
    assert driver.levels(a) == [32, 32, 8, 8, 8, 8, 8, 8, 32, 32], "sinks and the last 64 tokens stay whole"
    assert (driver.table.slots[a] >= 0).all()
    driver.check()


def test_pages_without_a_slot_settle_at_nothing():
    driver = Driver(hot_pages=40)
    a = driver.begin(320)
    driver.table.drop(a[3:5])
    driver.step()
    assert driver.levels(a[2:6]) == [8, 0, 0, 8]


def test_the_coldest_fall_first_when_the_pool_runs_short():
    """Pages whose mass the host knows, in a pool that a long prompt fills."""
    driver = Driver(hot_pages=16, interval=8)
    a = driver.begin(14 * PAGE_TOKENS)
    for rank, page in enumerate(a.tolist()):
        driver.add_mass(page, 100.0 - rank)
    driver.step(8 + LAG)
    assert (driver.store.mass.heat.values[a] > 0).all()
    driver.leave(a)
    driver.step()
    assert all(level >= 2 for level in driver.levels(a))
    before = driver.levels(a)
    driver.begin(13 * PAGE_TOKENS)
    after = driver.levels(a)
    assert after != before
    assert after == sorted(after, reverse=True), "mass falls with the index"
    driver.check()


def test_the_rows_of_largest_mass_stay_in_every_head():
    driver = Driver(hot_pages=20, geometry=GEOMETRY)
    a = driver.begin(320)
    page, table = int(a[4]), driver.table
    generator = torch.Generator().manual_seed(1)
    mass = torch.rand(GEOMETRY.layers, GEOMETRY.kv_heads, PAGE_TOKENS, generator=generator)
    visits = torch.arange(PAGE_TOKENS, 0, -1).float()
    table.values[:, table.slots[page]], table.visits[table.slots[page]] = mass * visits, visits
    driver.step()
    for level in (8, 4, 2):
        driver.store.residency.demote(page, level)
        best = mass.topk(level).indices
        expected = (torch.ones_like(best) << best).sum(-1).to(torch.int32)
        assert torch.equal(driver.store.hot.row_masks[:, page], expected), f"level {level}, by mass per visit"


def test_an_end_of_a_conversation_takes_no_more_than_a_share_of_settled_rows():
    driver = Driver(hot_pages=16)
    a = driver.begin(14 * PAGE_TOKENS)
    driver.leave(a)
    driver.step()
    for _ in range(12):  # ends of other conversations, each of two pages
        other = driver.begin(2 * PAGE_TOKENS)
        driver.store.table.window[other] = False
        driver.store.set_continuation_points(other, [2], 2)
        driver.check()
    assert sum(driver.levels(a)) // 2 >= len(a), "two rows of each page, less than a quarter of the pool"


def test_sinks_of_conversations_that_are_over_fall_last():
    """Nothing is known of any page: a sink keeps 8 rows while others have fallen to 2."""
    driver = Driver(hot_pages=16)
    a = driver.begin(14 * PAGE_TOKENS)
    driver.leave(a)
    driver.step()
    assert driver.levels(a) == [8] * 14
    driver.begin(14 * PAGE_TOKENS)
    assert driver.levels(a) == [8] * 2 + [2] * 12
    driver.check()


def test_partial_pages_never_fail():
    """Everything gives way to unsealed pages, the last two rows too."""
    driver = Driver(hot_pages=8)
    a = driver.begin(8 * PAGE_TOKENS)
    driver.leave(a)
    driver.step()
    for _ in range(7):
        driver.begin(20)
        driver.check()
    assert driver.levels(a) == [0] * 8
    with pytest.raises(RuntimeError, match="full of unsealed pages"):
        driver.begin(20)


def test_mass_arrives_at_fixed_forwards_and_decays():
    driver = Driver(hot_pages=40, interval=8)
    a = driver.begin(160)
    driver.add_mass(int(a[2]), 5.0)
    heat = driver.store.mass.heat
    while driver.store.residency.now < 8 + LAG - 1:
        assert np.isnan(heat.values[a]).all()
        driver.step()
    driver.step()
    assert heat.values[a[2]] == pytest.approx(5.0)
    assert heat.values[a[3]] == 0.0
    assert heat.covered_share == pytest.approx(8 / 32 if driver.levels(a)[2] == 8 else 1.0)
    driver.step(8)
    assert heat.values[a[2]] == pytest.approx(5.0 * 0.5 ** (8 / HALF_LIFE))


def test_pages_that_are_read_keep_so_many_rows_on_average_and_others_all():
    """The hottest pages keep theirs; a conversation that nobody reads costs no step anything."""
    driver = Driver(hot_pages=60, interval=8, hot_rows=1.0)
    read, idle = driver.begin(12 * PAGE_TOKENS), driver.begin(10 * PAGE_TOKENS)
    driver.leave(idle)
    for rank, page in enumerate(read.tolist()):
        driver.add_mass(page, 100.0 - rank)
    while driver.store.residency.now != 8 + LAG:
        assert set(driver.levels(read)) <= {8, 32}
        driver.read(read)
    settled = read[2:10]
    assert driver.levels(settled) == [2] * 4 + [0] * 4
    assert driver.levels(idle) == [8] * 10
    driver.check()


def test_a_page_that_is_used_again_has_none_of_the_mass_that_is_under_way():
    driver = Driver(hot_pages=40, interval=8)
    a = driver.begin(160)
    for page in a.tolist():
        driver.add_mass(page, 7.0)
    driver.step(8 - driver.store.residency.now)
    driver.store.free(a)
    b = driver.begin(160)
    assert np.array_equal(a, b)
    driver.step(LAG)
    assert np.isnan(driver.store.mass.heat.values[b]).all()
    assert not driver.table.page_mass(b).any()


def test_too_few_slots_go_to_whole_pages_and_those_of_most_rows():
    driver = Driver(hot_pages=8)  # 32 slots
    first = driver.begin(5 * PAGE_TOKENS)
    driver.leave(first)
    driver.step()
    for page in first.tolist():
        driver.store.residency.demote(page, 2)
    driver.table.free.take(len(driver.table.free) - 1)  # as if other pages held them
    b = driver.begin(3 * PAGE_TOKENS)
    assert (driver.table.slots[b] >= 0).all()
    assert np.count_nonzero(driver.table.slots[first] < 0) == 2


def test_a_duplicate_brings_its_mass_only_where_there_was_none():
    driver = Driver(hot_pages=40)
    a, b = driver.begin(128), driver.begin(128)
    for page, mass in ((a[0], 1.0), (a[1], 2.0), (b[0], 3.0), (b[1], 4.0)):
        driver.add_mass(int(page), mass)
    driver.store.residency.demote(int(a[0]), 0)
    driver.store.residency.demote(int(a[1]), 2)
    assert driver.store.adopt_hot_rows(b[:2], a[:2]) == 2
    assert driver.table.page_mass(a[:2]).tolist() == pytest.approx([3.0, 2.0])
    assert (driver.table.slots[b[:2]] < 0).all()


def test_integrity_sees_a_slot_of_a_page_without_rows():
    driver = Driver(hot_pages=40)
    a = driver.begin(128)
    driver.store.hot.release(int(a[1]))
    with pytest.raises(RuntimeError, match=f"1 pages without hot rows hold mass slots; first: page {a[1]}"):
        driver.check()


def test_decisions_need_time():
    with pytest.raises(ValueError, match="4 forwards between two decisions are too few"):
        Driver(hot_pages=8, interval=4)


# Properties ----------------------------------------------------------------------------------------------------------


def check_rises(store: KVStore, before: np.ndarray) -> None:
    """Pages that hold more rows than `before` have a copy to take them from."""
    rose = np.flatnonzero(store.hot.levels > before)
    assert not len(rose) or (store.copies and store.copies.host.holds(rose).all()), rose


@settings(max_examples=40)
@given(
    data=st.data(),
    hot_pages=st.integers(6, 30),
    interval=st.integers(LAG + 1, 12),
    host_pages=st.sampled_from([0, 5, 200]),
    hot_rows=st.sampled_from([0.5, 1.0, 8.0]),
)
def test_ranks_decide_alike_within_the_budget(data, hot_pages, interval, host_pages, hot_rows):
    """With a host store smaller than the hot pool, one for everything, and none."""
    ranks = Ranks(hot_pages, interval, host_pages=host_pages, hot_rows=hot_rows)
    alive: list[np.ndarray] = []
    ranks.both(lambda rank: rank.step())
    for turn in range(data.draw(st.integers(1, 15), label="turns")):
        store = ranks.ranks[0].store
        before = store.hot.levels.copy()
        action = data.draw(st.sampled_from(["begin", "begin", "leave", "free", "mass", "steps", "read"]), label="action")
        fresh = np.zeros(0, dtype=np.int64)
        if action == "begin" and sum(map(len, alive)) < 150:
            tokens = data.draw(st.integers(1, 40), label="pages") * PAGE_TOKENS
            fresh = ranks.both(lambda rank, tokens=tokens: rank.begin(tokens))
            alive.append(fresh)
        elif action == "leave" and alive:
            pages = data.draw(st.sampled_from(alive), label="which")
            ranks.both(lambda rank, pages=pages: rank.leave(pages))
        elif action == "free" and alive:
            pages = alive.pop(data.draw(st.integers(0, len(alive) - 1), label="which"))
            ranks.both(lambda rank, pages=pages: rank.store.free(pages))
        elif action == "mass":
            ranks.add_mass(turn)
        elif action in ("steps", "read"):
            pages = data.draw(st.sampled_from(alive), label="which") if action == "read" and alive else np.zeros(0, dtype=np.int64)
            for _ in range(data.draw(st.integers(1, 20), label="steps")):
                ranks.both(lambda rank, pages=pages: rank.read(pages))
                check_rises(store, before)
                before = store.hot.levels.copy()
        ranks.both(lambda rank: rank.check())
        one, other = (rank.store for rank in ranks.ranks)
        assert np.array_equal(one.hot.block_table, other.hot.block_table)
        assert np.array_equal(one.mass.table.slots, other.mass.table.slots)
        assert np.array_equal(one.mass.heat.values, other.mass.heat.values, equal_nan=True)
        assert set(np.unique(one.hot.levels)) <= set(LEVELS)
        assert one.hot.free_blocks == one.hot.capacity - int(one.hot.levels.astype(np.int64).sum()) // 2 >= 0
        before[fresh] = PAGE_TOKENS
        check_rises(store, before)
