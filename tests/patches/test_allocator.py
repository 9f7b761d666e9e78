"""The allocator hands out what SGLang's would, in the same order, whether the host knew the freed pages or had to read them."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.patches.allocator import OscarPageAllocator
from oscar_radix.patches.host_pages import note_pages
from tests.helpers import make_store
from tests.mini_server import TINY

PAGES = 24


class Pair:
    """Ours and SGLang's, given the same calls."""

    def __init__(self) -> None:
        size = PAGES * PAGE_TOKENS
        self.store = make_store(PAGES, geometry=TINY)
        self.ours = OscarPageAllocator(self.store, size, torch.bfloat16, "cpu", kvcache=None)
        self.stock = PagedTokenToKVPoolAllocator(size, PAGE_TOKENS, torch.bfloat16, "cpu", kvcache=None, need_sort=False)
        self.held: list[torch.Tensor] = []

    def alloc(self, pages: int, tail: int) -> None:
        """A row of that many pages of which `tail` slots of the last one are not written yet."""
        ours, stock = self.ours.alloc(pages * PAGE_TOKENS), self.stock.alloc(pages * PAGE_TOKENS)
        assert (ours is None) == (stock is None)
        if ours is not None:
            assert torch.equal(ours, stock)
            self.held.append(ours[: len(ours) - tail])

    def free(self, row: torch.Tensor, how: str, cut: int) -> None:
        """Free a row in two segments, as the end of a request does, or whole, as eviction does."""
        pages = (row[::PAGE_TOKENS] // PAGE_TOKENS).numpy()
        segments = [(row[:cut], 0), (row[cut:], cut)]
        if how == "plain":
            self.ours.free(row)
            self.stock.free(row)
        elif how == "node":
            value = row.clone()
            note_pages(value, pages)
            self.ours.free_segment(value, start_pos=0)
            self.stock.free_segment(row, start_pos=0)
        else:
            with self.ours.freeing_row(pages if how == "row" else None):
                self.ours.free_segments(segments)
            self.stock.free_segments(segments)

    def check(self) -> None:
        assert self.ours.free_pages.tolist() == self.stock.free_pages.tolist() == self.ours.free_page_numbers.tolist()
        assert self.ours.available_size() == self.stock.available_size()


@settings(max_examples=150)
@given(data=st.data())
def test_same_pages_in_the_same_order(data):
    pair = Pair()
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["alloc", "alloc", "free", "group", "clear"]))
        if action == "alloc":
            pair.alloc(data.draw(st.integers(1, 6)), data.draw(st.integers(0, PAGE_TOKENS - 1)))
        elif action == "clear":
            pair.ours.clear()
            pair.stock.clear()
            pair.held.clear()
        elif pair.held:
            group = action == "group"
            # SGLang frees plain slots of a group before its segments, so a group has the one or the other.
            kinds = ["row", "node", "unknown"] if group else ["plain", "row", "node", "unknown"]
            if group:
                pair.ours.free_group_begin()
                pair.stock.free_group_begin()
            for _ in range(data.draw(st.integers(1, len(pair.held))) if group else 1):
                row = pair.held.pop(data.draw(st.integers(0, len(pair.held) - 1)))
                cut = data.draw(st.integers(0, len(row) // PAGE_TOKENS)) * PAGE_TOKENS
                pair.free(row, data.draw(st.sampled_from(kinds)), cut)
            if group:
                pair.ours.free_group_end()
                pair.stock.free_group_end()
        pair.check()


def test_sglang_may_set_and_sort_the_free_list():
    pair = Pair()
    pair.alloc(5, 0)
    pair.free(pair.held.pop(), "unknown", 64)
    pair.ours.free_pages = torch.sort(pair.ours.free_pages).values
    assert pair.ours.free_page_numbers.tolist() == list(range(1, PAGES + 1))
    assert pair.ours.alloc(PAGE_TOKENS).tolist() == list(range(PAGE_TOKENS, 2 * PAGE_TOKENS))


def test_pages_that_a_step_takes_are_noted_on_its_slots():
    pair = Pair()
    lengths = torch.tensor([33, 40, 65])
    slots = pair.ours.alloc_decode(lengths, lengths, torch.tensor([700, 680, 650], dtype=torch.int32))
    assert slots.tolist() == [32, 681, 64]
    assert slots.oscar_new_pages.tolist() == [1, 2]
    assert not np.isin([1, 2], pair.ours.free_page_numbers).any()
