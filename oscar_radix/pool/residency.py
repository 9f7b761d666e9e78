"""Which pages hold hot rows: decided on the host once a forward, before its kernels run."""

import numpy as np

from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.policy.base import Policy
from oscar_radix.pool.decode_marks import DecodeMarks
from oscar_radix.pool.hot_pool import HotPool
from oscar_radix.pool.pages import PageTable
from oscar_radix.pool.request_pages import DecodeStep
from oscar_radix.pool.victims import SETTLED, SINK, SINK_IN_USE, Victims
from oscar_radix.sequence import SINK_PAGES, Sequence


class Residency:
    """Marks windows, lets the policy settle what left them, and finds blocks for what enters them."""

    def __init__(self, geometry: Geometry, table: PageTable, hot: HotPool, policy: Policy, recent_tokens: int):
        self.geometry = geometry
        self.table = table
        self.hot = hot
        self.policy = policy
        self.recent_tokens = recent_tokens
        self.marks = DecodeMarks(table, recent_tokens)
        self.now = 0
        self.demotions = 0
        self.sealed_without_hot_rows = 0

    def prepare(self, sequences: list[Sequence]) -> None:
        """Bring the hot pool to the state that this forward reads and writes.

        Raises:
            RuntimeError: when not even the partial last pages of the sequences fit; the pool is sized so that they do.
        """
        self.now += 1
        self.marks.forget()
        self._mark(sequences)
        self._settle()
        victims = self._victims()
        for sequence in sequences:
            self._fill(sequence.pages[sequence.seq_len // PAGE_TOKENS :], victims, len(sequences))
        for sequence in sequences:
            self._complete(self._by_need(sequence.completed), victims)
        # Only now: a page whose record is not written yet must not be anybody's victim.
        for sequence in sequences:
            self.table.sealed[sequence.completed] = True
        self.hot.sync_tables()

    def prepare_decode(self, step: DecodeStep) -> None:
        """`prepare` for the sequences of a decode step; cheap where nothing but their lengths has changed since the last step.

        Raises:
            RuntimeError: as `prepare`.
        """
        self.now += 1
        self._settle(self.marks.mark(step, self.now))
        victims = self._victims()
        newest = step.requests.pages[step.rows, (step.lengths - 1) // PAGE_TOKENS]
        full = step.lengths % PAGE_TOKENS == 0
        self._fill(newest[~full], victims, len(newest))
        self._complete(newest[full], victims)
        self.table.sealed[newest[full]] = True
        self.hot.sync_tables()

    def _fill(self, pages: np.ndarray, victims: Victims, sequences: int) -> None:
        """Find blocks for pages that stay partial, at any price."""
        for page in pages[self.hot.levels[pages] == 0].tolist():
            if not self._acquire(page, victims, SINK_IN_USE):
                raise RuntimeError(
                    f"the hot pool of {self.hot.capacity} blocks is full of unsealed pages: {sequences} sequences need one "
                    f"page of 16 blocks each; lower --max-running-requests or raise --oscar-hot-fraction"
                )

    def _complete(self, pages: np.ndarray, victims: Victims) -> None:
        """Find blocks for pages that become full; without them a page is sealed from its rows all the same."""
        for page in pages[self.hot.levels[pages] == 0].tolist():
            if not self._acquire(page, victims, SINK if self.table.window[page] else SETTLED):
                self.sealed_without_hot_rows += 1

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

    def _settle(self, left: np.ndarray | None = None) -> None:
        """Let the policy have whole pages that nothing needs any more: among `left`, or all there are."""
        table = self.table
        if left is None:
            idle = (self.hot.levels == PAGE_TOKENS) & table.sealed & ~table.window & ~table.continuation & ~table.prefilling
            pages = np.flatnonzero(idle)
        else:
            pages = np.unique(left)
            idle = (self.hot.levels[pages] == PAGE_TOKENS) & table.sealed[pages]
            pages = pages[idle & ~table.window[pages] & ~table.continuation[pages] & ~table.prefilling[pages]]
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

    def _victims(self) -> Victims:
        return Victims(self.table, self.hot, self.policy, self.now)

    def _acquire(self, page: int, victims: Victims, highest: int) -> bool:
        while not self.hot.acquire(page):
            victim = victims.take(highest)
            if victim is None:
                return False
            self.demote(victim, 0)
        return True
