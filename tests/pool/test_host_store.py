"""The host store: copies come back bit by bit, the least recently used gives way, and every slot has one owner."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.host_store import PAGES_AT_ONCE, HostStore
from oscar_radix.pool.hot_pool import PAGE_BLOCKS, HotPool
from tests.helpers import GEOMETRY
from tests.mini_server import TINY

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])]


def make(hot_pages: int, slots: int, geometry=TINY, pages: int = 64, device: str = "cpu") -> tuple[HotPool, HostStore]:
    hot = HotPool(geometry, pages, hot_pages * PAGE_BLOCKS, device)
    return hot, HostStore(hot, geometry, pages, slots)


def fill(hot: HotPool, pages: np.ndarray, seed: int) -> None:
    """Random rows and scales in the blocks of `pages`, which become whole."""
    generator = torch.Generator().manual_seed(seed)
    for page in pages.tolist():
        assert hot.acquire(page)
    blocks = hot.blocks_of(pages, PAGE_TOKENS).reshape(-1)
    for rows in (hot.k_rows, hot.v_rows):
        rows[:, blocks] = torch.randint(-128, 128, rows[:, blocks].shape, generator=generator, dtype=torch.int8).to(rows.device)
    hot.scales[:, blocks] = torch.rand(hot.scales[:, blocks].shape, generator=generator).half().to(hot.scales.device)


def rows_of(hot: HotPool, pages: np.ndarray) -> list[torch.Tensor]:
    rows = [hot.read(layer, hot.blocks_of(pages, PAGE_TOKENS)) for layer in range(len(hot.k_rows))]
    return [torch.stack([getattr(layer, name) for layer in rows]) for name in ("k", "k_scale", "v", "v_scale")]


@pytest.mark.parametrize("device", DEVICES)
def test_restored_rows_are_bit_by_bit_those_copied(device):
    """More pages than pass at once, in slots that do not follow each other, back into other blocks."""
    count = PAGES_AT_ONCE + 5
    hot, host = make(hot_pages=count, slots=count + 3, geometry=GEOMETRY, device=device)
    first, pages = np.arange(1, 4), np.arange(10, 10 + count)
    fill(hot, first, seed=0)
    host.copy(first, np.arange(3), now=1)
    host.forget(first[1:2])  # a gap
    for page in first.tolist():
        hot.release(page)
    fill(hot, pages, seed=1)
    expected = rows_of(hot, pages)
    host.copy(pages, np.arange(count), now=2)
    host.fence()
    for page in pages.tolist():
        hot.release(page)
    order = np.random.default_rng(0).permutation(pages)
    fill(hot, order, seed=2)
    host.restore(order)
    for part, copied in zip(rows_of(hot, pages), expected, strict=True):
        assert torch.equal(part, copied)
    host.check_integrity()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_copy_is_ordered_with_the_current_stream():
    """Rows that a slow kernel still writes are copied when it has; blocks are overwritten after `fence`, when they have been copied."""
    hot, host = make(hot_pages=40, slots=40, geometry=GEOMETRY, device="cuda")
    pages = np.arange(1, 41)
    fill(hot, pages, seed=3)
    expected = [(part + 1 if part.dtype == torch.int8 else part).clone() for part in rows_of(hot, pages)]
    for _ in range(5):
        torch.cuda._sleep(20_000_000)
        hot.k_rows += 1
        hot.v_rows += 1
        host.forget(pages)
        host.copy(pages, np.arange(40), now=1)
        host.fence()
        hot.k_rows -= 1
        hot.v_rows -= 1
    host.restore(pages)
    for part, copied in zip(rows_of(hot, pages), expected, strict=True):
        assert torch.equal(part, copied)


def test_the_least_recently_used_gives_way_and_of_one_time_the_deepest():
    hot, host = make(hot_pages=20, slots=6)
    a, b = np.arange(1, 4), np.arange(4, 7)
    fill(hot, np.arange(1, 13), seed=0)
    host.copy(a, np.arange(3), now=1)
    host.copy(b, np.arange(3), now=2)
    host.touch(a, now=3)
    host.copy(np.array([7]), np.array([9]), now=4)
    assert host.holds(b).tolist() == [True, True, False]
    host.copy(np.array([8, 9, 10]), np.arange(3), now=5)
    assert host.holds(b).tolist() == [False] * 3
    assert host.holds(a).tolist() == [True, True, False]
    assert (host.copied, host.dropped, host.pages_held) == (10, 4, 6)


def test_of_more_pages_than_slots_the_last_are_kept():
    hot, host = make(hot_pages=20, slots=4)
    pages = np.arange(1, 11)
    fill(hot, pages, seed=0)
    host.copy(pages, np.arange(10), now=1)
    assert host.holds(pages).tolist() == [False] * 6 + [True] * 4
    host.check_integrity()


def test_a_page_with_a_copy_is_not_copied_again():
    hot, host = make(hot_pages=4, slots=4)
    fill(hot, np.array([1]), seed=0)
    host.copy(np.array([1]), np.array([0]), now=1)
    before = host._rows.clone()
    hot.k_rows += 1
    host.copy(np.array([1]), np.array([0]), now=2)
    assert torch.equal(host._rows, before)
    assert host.copied == 1


def test_a_copy_moves_to_a_page_that_has_none():
    hot, host = make(hot_pages=4, slots=4)
    fill(hot, np.array([1, 2]), seed=0)
    host.copy(np.array([1, 2]), np.arange(2), now=1)
    host.move(1, 5)
    host.move(2, 5)
    assert host.holds(np.array([1, 2, 5])).tolist() == [False, False, True]
    assert host.pages_held == 1
    host.check_integrity()


def test_bytes_are_what_is_allocated():
    _, host = make(hot_pages=2, slots=3, geometry=GEOMETRY)
    assert host.nbytes == 3 * HostStore.page_bytes(GEOMETRY) == 3 * GEOMETRY.layers * GEOMETRY.kv_heads * PAGE_TOKENS * 2 * (64 + 2)


def test_a_store_without_room_is_refused():
    with pytest.raises(ValueError, match="room for a page at least, not for 0"):
        make(hot_pages=2, slots=0)


def test_integrity_sees_a_slot_with_two_owners():
    hot, host = make(hot_pages=4, slots=4)
    fill(hot, np.array([1]), seed=0)
    host.copy(np.array([1]), np.array([0]), now=1)
    host.slots[2] = host.slots[1]
    with pytest.raises(RuntimeError, match=r"1 of 4 host slots have \[2\] owners, not 1; first: \[0\]"):
        host.check_integrity()


@settings(max_examples=60)
@given(data=st.data(), slots=st.integers(1, 12))
def test_what_is_held_is_what_was_copied(data, slots):
    """Any sequence of copies, touches, moves and frees, against a dictionary of rows."""
    hot, host = make(hot_pages=16, slots=slots, pages=17)
    copied: dict[int, list[torch.Tensor]] = {}
    pages = st.lists(st.integers(1, 16), min_size=1, max_size=6, unique=True).map(np.array)
    fill(hot, np.arange(1, 17), seed=0)
    for now in range(data.draw(st.integers(1, 12))):
        chosen = data.draw(pages)
        action = data.draw(st.sampled_from(["copy", "touch", "free", "move"]))
        if action == "copy":
            for page in chosen.tolist():
                hot.release(page)
            fill(hot, chosen, seed=now)
            host.forget(chosen)
            host.copy(chosen, np.arange(len(chosen)), now)
            copied.update({page: rows_of(hot, np.array([page])) for page in chosen.tolist()})
        elif action == "touch":
            host.touch(chosen, now)
        elif action == "free":
            host.forget(chosen)
        elif len(chosen) > 1 and host.slots[chosen[0]] >= 0 and host.slots[chosen[1]] < 0:
            host.move(int(chosen[0]), int(chosen[1]))
            copied[int(chosen[1])] = copied[int(chosen[0])]
        host.check_integrity()
        assert host.pages_held <= slots
        held = np.flatnonzero(host.slots >= 0)
        for page in held.tolist():
            hot.release(page)
        fill(hot, held, seed=100 + now)
        if len(held):
            host.restore(held)
        for page in held.tolist():
            assert all(map(torch.equal, rows_of(hot, np.array([page])), copied[page]))
