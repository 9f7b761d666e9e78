"""Which pages hold hot rows: decided on the host once a forward, before its kernels run."""

import numpy as np

from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.policy.base import Policy
from oscar_radix.pool.hot_pool import HotPool
from oscar_radix.pool.pages import PageTable
from oscar_radix.sequence import SINK_PAGES, Sequence

SETTLED, PREFILLING, WINDOW, SINK, WINDOW_IN_USE, SINK_IN_USE = range(6)
"""Classes of hot pages in the order in which they give way: outside every window; a prompt in progress; windows and continuation
points of requests that are not in this forward, then their sinks; those of requests that are. A sequence whose sinks are read in 2
bits is several times further from bf16 than one whose window is, so sinks give way last."""


class Residency:
    """Marks windows, lets the policy settle what left them, and finds blocks for what enters them."""

    def __init__(self, geometry: Geometry, table: PageTable, hot: HotPool, policy: Policy, recent_tokens: int):
        self.geometry = geometry
        self.table = table
        self.hot = hot
        self.policy = policy
        self.recent_tokens = recent_tokens
        self.now = 0
        self.demotions = 0
        self.sealed_without_hot_rows = 0

    def prepare(self, sequences: list[Sequence]) -> None:
        """Bring the hot pool to the state that this forward reads and writes.

        Raises:
            RuntimeError: when not even the partial last pages of the sequences fit; the pool is sized so that they do.
        """
        self.now += 1
        self._mark(sequences)
        self._settle()
        victims = _Victims(self)
        for sequence in sequences:
            partial = sequence.pages[sequence.seq_len // PAGE_TOKENS :]
            for page in partial:
                if not self.hot.levels[page] and not self._acquire(int(page), victims, SINK_IN_USE):
                    raise RuntimeError(
                        f"the hot pool of {self.hot.capacity} blocks is full of unsealed pages: {len(sequences)} sequences need one "
                        f"page of 16 blocks each; lower --max-running-requests or raise --oscar-hot-fraction"
                    )
        for sequence in sequences:
            for page in self._by_need(sequence.completed):
                if not self.hot.levels[page] and not self._acquire(int(page), victims, SINK if self.table.window[page] else SETTLED):
                    self.sealed_without_hot_rows += 1
        # Only now: a page whose record is not written yet must not be anybody's victim.
        for sequence in sequences:
            self.table.sealed[sequence.completed] = True
        self.hot.sync_tables()

    def _mark(self, sequences: list[Sequence]) -> None:
        table = self.table
        for sequence in sequences:
            table.position[sequence.pages] = np.arange(len(sequence.pages))
            table.window[sequence.pages] = False
            if sequence.decode:
                table.prefilling[sequence.pages] = False
            elif sequence.prefix_len:
                matched = sequence.matched_end(self.recent_tokens)
                if not table.prefilling[matched[-1]]:
                    table.continuation[matched] = True
                    table.last_use[matched] = self.now
        for sequence in sequences:
            window = sequence.window(self.recent_tokens)
            table.window[window] = True
            table.last_use[window] = self.now
            if not sequence.decode:
                table.prefilling[sequence.written] = True
                table.last_use[sequence.written] = self.now

    def _settle(self) -> None:
        table = self.table
        whole = (self.hot.levels == PAGE_TOKENS) & table.sealed
        pages = np.flatnonzero(whole & ~table.window & ~table.continuation & ~table.prefilling)
        if not len(pages):
            return
        level = self.policy.settle(pages)
        if level == PAGE_TOKENS:
            return
        for page in pages.tolist():
            self.demote(page, level)

    def demote(self, page: int, level: int) -> None:
        """Lower a sealed page to `level`; nothing but hot rows is lost."""
        if level == 0:
            self.hot.release(page)
            self.table.continuation[page] = False
        else:
            rows = self.policy.choose_rows(page, level, self.geometry.layers, self.geometry.kv_heads, PAGE_TOKENS)
            self.hot.shrink(page, rows.to(self.hot.device))
        self.demotions += 1

    def _by_need(self, pages: np.ndarray) -> np.ndarray:
        """Pages that are being filled: sinks first, then the window and then the rest, each from the newest back."""
        sink, window = self.table.position[pages] < SINK_PAGES, self.table.window[pages]
        return pages[np.lexsort((-self.table.position[pages], ~window, ~sink))]

    def _acquire(self, page: int, victims: "_Victims", highest: int) -> bool:
        while not self.hot.acquire(page):
            victim = victims.take(highest)
            if victim is None:
                return False
            self.demote(victim, 0)
        return True


class _Victims:
    """Hot pages in the order in which they give way in one forward; ranked only when the pool first runs short."""

    def __init__(self, residency: Residency):
        self._residency = residency
        self._queue: list[tuple[int, int]] | None = None

    def take(self, highest: int) -> int | None:
        """Next page to demote whose class is at most `highest`; None when there is none."""
        if self._queue is None:
            self._queue = self._rank()
        if not self._queue or self._queue[-1][0] > highest:
            return None
        return self._queue.pop()[1]

    def _rank(self) -> list[tuple[int, int]]:
        table, hot, now = self._residency.table, self._residency.hot, self._residency.now
        pages = np.flatnonzero((hot.levels > 0) & table.sealed)
        kept = table.window[pages] | table.continuation[pages]
        classes = np.where(kept, WINDOW, np.where(table.prefilling[pages], PREFILLING, SETTLED))
        classes[table.window[pages] & (table.position[pages] < SINK_PAGES)] = SINK
        classes[kept & (table.last_use[pages] == now)] += WINDOW_IN_USE - WINDOW
        ranked: list[tuple[int, int]] = []
        for value in (SETTLED, PREFILLING, WINDOW, SINK, WINDOW_IN_USE, SINK_IN_USE):
            members = pages[classes == value]
            order = self._residency.policy.demotion_order(members, table.last_use[members], table.position[members].astype(np.int64))
            ranked.extend((value, int(page)) for page in members[order])
        return ranked[::-1]
