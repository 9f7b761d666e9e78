"""Hot pages in the order in which they give way to others."""

from collections.abc import Iterator

import numpy as np

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.policy.base import Policy
from oscar_radix.pool.hot_pool import HotPool
from oscar_radix.pool.pages import PageTable
from oscar_radix.sequence import SINK_PAGES

SETTLED, PREFILLING, WINDOW, SINK, WINDOW_IN_USE, SINK_IN_USE = range(6)
"""Classes of hot pages in the order in which they give way: outside every window; a prompt in progress; windows and continuation
points of requests that are not in this forward, then their sinks; those of requests that are. A sequence whose sinks are read in 2
bits is several times further from bf16 than one whose window is, so sinks give way last."""


class Victims:
    """The order of one forward. Pages are classed when the pool first runs short, and a class is sorted when its turn comes.

    Args:
        table, hot, policy: pages, and who orders them.
        now: count of this forward.
        whole_pages: only pages at level 32.
    """

    def __init__(self, table: PageTable, hot: HotPool, policy: Policy, now: int, whole_pages: bool = False):
        self._table, self._hot, self._policy, self._now = table, hot, policy, now
        self._least = PAGE_TOKENS if whole_pages else 1
        self._order = self._ranked()
        self._next: tuple[int, int] | None = None

    def take(self, highest: int) -> int | None:
        """Next page to demote whose class is at most `highest`; None when there is none."""
        if self._next is None:
            self._next = next(self._order, None)
        if self._next is None or self._next[0] > highest:
            return None
        page, self._next = self._next[1], None
        return page

    def take_up_to(self, count: int, highest: int) -> list[int]:
        """The next `count` pages to demote whose class is at most `highest`, or as many as there are."""
        pages: list[int] = []
        while len(pages) < count and (page := self.take(highest)) is not None:
            pages.append(page)
        return pages

    def _ranked(self) -> Iterator[tuple[int, int]]:
        table, hot = self._table, self._hot
        pages = np.flatnonzero((hot.levels >= self._least) & table.sealed)
        kept = table.window[pages] | table.continuation[pages]
        classes = np.where(kept, WINDOW, np.where(table.prefilling[pages], PREFILLING, SETTLED))
        classes[table.window[pages] & (table.position[pages] < SINK_PAGES)] = SINK
        classes[kept & (table.last_use[pages] == self._now)] += WINDOW_IN_USE - WINDOW
        for value in range(SINK_IN_USE + 1):
            members = pages[classes == value]
            order = self._policy.demotion_order(members, table.last_use[members], table.position[members].astype(np.int64))
            for page in members[order].tolist():
                yield value, page
