"""Rows that come back from the host store: windows of readers, and pages that have become hot; never from nothing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.policy.base import LAG
from tests.helpers import GEOMETRY, make_store
from tests.mini_server import TINY, MiniServer, tokens_of
from tests.pool.mass_driver import Driver

INTERVAL = 8


def cold(driver: Driver, pages: np.ndarray) -> None:
    """Two forwards, in which pages are copied, and then they lose all rows."""
    driver.step(2)
    driver.leave(pages)
    for page in pages.tolist():
        if driver.store.hot.levels[page]:
            driver.store.residency.demote(page, 0)
    assert driver.levels(pages) == [0] * len(pages)
    driver.check()


def decide(driver: Driver, pages: np.ndarray) -> None:
    """Forwards that read `pages`, up to and with the next decision."""
    driver.read(pages)
    while driver.store.residency.now % INTERVAL != LAG:
        driver.read(pages)


def test_a_reader_gets_the_window_and_the_sinks_back():
    driver = Driver(hot_pages=40, geometry=GEOMETRY, host_pages=100)
    a = driver.begin(10 * PAGE_TOKENS)
    cold(driver, a)
    driver.follow(a, 40)
    assert driver.levels(a) == [32, 32, 0, 0, 0, 0, 0, 0, 32, 32]
    driver.check()
    assert driver.store.copies.promoted_to[32] == 4


def test_a_window_comes_back_only_as_far_as_there_is_room():
    """Partial pages of others and the reader's own leave three."""
    driver = Driver(hot_pages=12, geometry=GEOMETRY, host_pages=100)
    a = driver.begin(6 * PAGE_TOKENS)
    cold(driver, a)
    for _ in range(7):
        driver.begin(20)
    driver.follow(a, 40)
    assert sum(level == 32 for level in driver.levels(a)) == 3
    assert driver.levels(a)[:2] == [32, 32], "sinks first"
    driver.check()


def test_without_a_copy_nothing_comes_back():
    driver = Driver(hot_pages=40, host_pages=3)
    a = driver.begin(10 * PAGE_TOKENS)
    cold(driver, a)
    driver.follow(a, 40)
    assert driver.levels(a) == [0] * 8 + [32, 32], "the store has room for three pages, the last three of the prompt"


def test_a_page_that_becomes_hot_rises_and_holds_the_rows_that_are_read():
    driver = Driver(hot_pages=40, interval=INTERVAL, geometry=GEOMETRY, host_pages=100)
    a = driver.begin(12 * PAGE_TOKENS)
    cold(driver, a[2:8])
    decide(driver, a)
    assert (driver.table.slots[a[2:8]] >= 0).all(), "watched since the decision, or still"
    driver.table.values[:, driver.table.slots[a[4]], :, [3, 9, 17, 30]] += 50.0
    driver.table.visits[driver.table.slots[a[4]]] += 1
    decide(driver, a)
    decide(driver, a)
    assert driver.levels(a)[4] == 8, "there is room for all"
    mask = int(driver.store.hot.row_masks[0, a[4], 0]) & 0xFFFFFFFF
    assert all(mask >> token & 1 for token in (3, 9, 17, 30))
    assert driver.store.copies.promoted_to[8] >= 1
    driver.check()


def test_the_hotter_takes_the_place_of_the_colder():
    """A full pool: a page rises only because another one falls."""
    driver = Driver(hot_pages=8, interval=INTERVAL, host_pages=100)
    driver.step()
    parts = []
    for _ in range(12):
        parts.append(driver.begin(5 * PAGE_TOKENS))
        driver.step(2)
        driver.leave(parts[-1])
        driver.step()
    a = np.concatenate(parts)
    cold_one = a[10:][driver.store.copies.host.holds(a[10:])][0]
    driver.store.residency.demote(int(cold_one), 0)
    before = driver.levels(a)
    for _ in range(4):
        decide(driver, a)
        for page in a[driver.table.slots[a] >= 0].tolist():
            driver.add_mass(page, 1000.0 if page == cold_one else 0.01)
    after = driver.levels(a)
    assert driver.levels(np.array([cold_one])) == [8]
    fell = np.array(after) < before
    assert fell.any()
    assert sum(after) // 2 <= driver.store.hot.capacity - driver.store.residency.by_mass.slack
    driver.check()


def test_with_every_page_hot_there_is_nothing_to_raise():
    driver = Driver(hot_pages=40, interval=INTERVAL, host_pages=100)
    a = driver.begin(10 * PAGE_TOKENS)
    driver.leave(a)
    for _ in range(3):
        for page in a.tolist():
            if driver.table.slots[page] >= 0:
                driver.add_mass(page, 10.0)
        decide(driver, a[:0])
    assert driver.levels(a) == [8] * 10
    assert driver.store.copies.promoted_to.sum() == 0


def test_a_full_store_keeps_what_is_read():
    driver = Driver(hot_pages=60, interval=INTERVAL, host_pages=20, pages=400)
    a = driver.begin(8 * PAGE_TOKENS)
    driver.step()
    for _ in range(12):
        driver.store.touch(a)
        driver.begin(4 * PAGE_TOKENS)
        driver.step()
        driver.check()
    host = driver.store.copies.host
    assert host.holds(a).all()
    assert host.pages_held == 20
    assert host.dropped == host.copied - 20 > 0


def test_a_duplicate_leaves_its_copy_to_the_trees_page():
    driver = Driver(hot_pages=40, host_pages=100)
    a = driver.begin(4 * PAGE_TOKENS)
    cold(driver, a)
    driver.store.copies.host.forget(a)
    b = driver.begin(4 * PAGE_TOKENS)
    driver._salts[a] = driver._salts[b] + 11 * (b - a)  # the same tokens
    driver.store.adopt_hot_rows(b, a)
    driver.store.free(b)
    assert not driver.store.copies.host.holds(a).any(), "the duplicate had not been copied yet"
    driver.step()
    assert driver.store.copies.host.holds(a).all()
    cold(driver, a)
    driver.follow(a, 40)
    driver.check()


@pytest.mark.parametrize("policy", ["none", "window", "random", "attention"])
def test_a_hit_is_whole_where_the_host_store_has_its_end(policy):
    """The tree of a server whose rows of this prompt are gone: without copies the match is shortened by the window."""
    for host_pages, kept in ((0, 6), (40, 8)):
        server = MiniServer(make_store(pages=40, hot_pages=20, policy=policy, recent_tokens=64, geometry=TINY, host_pages=host_pages))
        prompt = tokens_of([1, 2, 3, 4, 5, 6, 7, 8])
        for tokens in (prompt, tokens_of([9])):
            request = server.start(tokens)
            server.prefill([(request, request.prompt_left)])
            server.end_of_prefill([request])
            server.finish(request)
        pages = server.stock_match(prompt)
        for page in pages.tolist():
            if server.store.hot.levels[page]:
                server.store.residency.demote(page, 0)
        assert len(server.match(prompt)) == kept
        request = server.start([*prompt, 77])
        server.prefill([(request, request.prompt_left)])
        assert server.store.is_whole(pages[-2:]).all() == bool(host_pages)
        assert server.store.is_whole(pages[:2]).all() == bool(host_pages), "sinks"
        server.end_of_prefill([request])
        server.finish(request)
        server.tree.check_integrity()


@settings(max_examples=40)
@given(data=st.data(), hot_pages=st.integers(6, 30), host_pages=st.integers(1, 120))
def test_rows_are_always_those_that_were_written(data, hot_pages, host_pages):
    """Whatever is begun, continued, read, demoted and freed: every hot row is the row of its page and token, and owners add up."""
    driver = Driver(hot_pages, INTERVAL, host_pages=host_pages)
    alive: list[np.ndarray] = []
    driver.step()
    for turn in range(data.draw(st.integers(1, 15), label="turns")):
        action = data.draw(st.sampled_from(["begin", "follow", "leave", "read", "free", "mass", "demote"]), label="action")
        if action == "begin" and sum(map(len, alive)) < 120:
            alive.append(driver.begin(data.draw(st.integers(1, 30), label="pages") * PAGE_TOKENS))
        elif alive:
            pages = alive[data.draw(st.integers(0, len(alive) - 1), label="which")]
            if action == "follow" and sum(map(len, alive)) < 150:
                own = driver.follow(pages, data.draw(st.integers(1, 3), label="pages") * PAGE_TOKENS)[len(pages) :]
                alive.append(own)
            elif action == "leave":
                driver.leave(pages)
            elif action == "read":
                driver.read(pages, data.draw(st.integers(1, 2 * INTERVAL), label="forwards"))
            elif action == "mass":
                for page in np.flatnonzero(driver.table.slots >= 0).tolist():
                    driver.add_mass(page, float((page * 7919 + turn) % 100))
            elif action == "demote":
                for page in pages[(driver.store.hot.levels[pages] > 0) & driver.store.table.sealed[pages]].tolist():
                    driver.store.residency.demote(page, 0)
            elif action == "free":
                alive = [other for other in alive if other is not pages]
                driver.store.free(pages)
        driver.check()
