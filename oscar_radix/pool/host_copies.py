"""When pages are copied to the host store, and which come back: the protocol of one forward after another."""

from collections.abc import Callable

import numpy as np

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.host_store import HostStore
from oscar_radix.pool.hot_pool import BLOCK_ROWS, PAGE_BLOCKS, HotPool
from oscar_radix.pool.pages import Owner, PageTable


class HostCopies:
    """Copies every page in the forward after the one that sealed it, while its rows are still whole, and brings rows back.

    Copies run beside the forward. `begin` waits for those of the forward before; who takes rows from a page that is being copied makes
    the forward wait, too: `guard` before they are moved, `end` before freed blocks are written.

    Args:
        table, hot: pages and hot pool.
        host: where copies are.
    """

    def __init__(self, table: PageTable, hot: HotPool, host: HostStore):
        self.table, self.hot, self.host = table, hot, host
        self.promoted_to = np.zeros(PAGE_TOKENS + 1, dtype=np.int64)
        """Pages that rose to each level by rows of the host store, by the level."""
        self.busy = np.zeros(table.count, dtype=bool)
        """Pages that are being copied."""
        self._copying = np.zeros(0, dtype=np.int64)
        self._sealed: list[np.ndarray] = []
        hot.before_moving_rows = self.guard

    def begin(self, now: int) -> np.ndarray:
        """Before the changes of forward `now`: copy what was sealed and still has all its rows.

        Returns:
            int64 [N], pages that have lost their copies.
        """
        self._wait()
        if not self._sealed:
            return np.zeros(0, dtype=np.int64)
        pages = np.unique(np.concatenate(self._sealed))
        self._sealed.clear()
        table = self.table
        pages = pages[(self.hot.levels[pages] == PAGE_TOKENS) & table.sealed[pages] & (table.owner[pages] != Owner.FREE)]
        self.busy[pages], self._copying = True, pages
        return self.host.copy(pages, table.position[pages], now)

    def sealed(self, pages: np.ndarray) -> None:
        """`pages` (int64 [N]) are sealed in this forward, or have got whole rows since the last one."""
        if len(pages):
            self._sealed.append(pages)

    def guard(self, pages: np.ndarray) -> None:
        """Rows of `pages` (int64 [N]) are about to be moved."""
        if self.busy[pages].any():
            self._wait()

    def end(self) -> None:
        """After the changes of a forward: blocks that were freed will be written by its kernels."""
        if (self.hot.levels[self._copying] < PAGE_TOKENS).any():
            self._wait()

    def _wait(self) -> None:
        self.host.fence()
        self.busy[self._copying] = False
        self._copying = self._copying[:0]

    def take_over(self, duplicates: np.ndarray, originals: np.ndarray) -> None:
        """Copies of `duplicates` are as good for `originals` (int64 [N] each, page by page the same tokens), also those not made yet."""
        for duplicate, original in zip(duplicates.tolist(), originals.tolist(), strict=True):
            if self.host.slots[duplicate] >= 0:
                self.host.move(duplicate, original)
        self.sealed(originals[(self.hot.levels[originals] == PAGE_TOKENS) & ~self.host.holds(originals)])

    def raise_pages(self, pages: np.ndarray, level: int, make_room: Callable[[], bool] = lambda: False) -> np.ndarray:
        """Make pages whole that have a copy and are below level 32, in order, as many of them as blocks can be had for.

        Args:
            pages: int64 [N], distinct.
            level: to which the caller lowers them next; they count as risen to it.
            make_room: takes blocks from other pages; False when it cannot.

        Returns:
            int64 [M], the first M of `pages`.
        """
        raised = []
        for page in pages.tolist():
            while (short := self._available(page) < PAGE_BLOCKS) and make_room():
                pass
            if short:
                break
            if self.hot.levels[page]:
                self.hot.release(page)
            self.hot.acquire(page)
            raised.append(page)
        done = pages[: len(raised)]
        if len(done):
            self.host.restore(done)
            self.promoted_to[level] += len(done)
        return done

    def _available(self, page: int) -> int:
        """Blocks for `page`: free ones and its own."""
        return self.hot.free_blocks + int(self.hot.levels[page]) // BLOCK_ROWS
