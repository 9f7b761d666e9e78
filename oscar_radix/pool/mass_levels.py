"""Levels of settled pages by their attention mass: what the `attention` policy decides, done to the hot pool."""

from collections.abc import Callable

import numpy as np

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.policy.base import LAG, Policy
from oscar_radix.pool.host_copies import HostCopies
from oscar_radix.pool.hot_pool import BLOCK_ROWS, PAGE_BLOCKS, HotPool
from oscar_radix.pool.mass_parts import MassParts
from oscar_radix.pool.pages import PageTable
from oscar_radix.sequence import SINK_PAGES

SLOT_BLOCKS = 4
"""Hot blocks for each slot of the mass table: every page that holds 8 rows can be tracked."""

HALF_LIFE = 512
"""Forwards after which mass counts half."""

SLACK_SHARE, SETTLED_SHARE = 8, 2
"""Parts of the pool that are kept free, so that fresh pages and prompts find room without a launch each; and that settled rows keep
when the ends of conversations that are not running ask for more."""

UNKNOWN_SINK = 40.0
"""Mass of a sink page of which nothing is known yet, in means of the known pages; enough for 8 rows while others hold 2."""

MOST_RAISED = 64
"""Pages that rise in one decision: each passes whole over the bus, 2.3 MiB at 36 layers of 8 heads of 128."""

WATCHED_SHARE = 8
"""Part of the mass slots that go, from one decision to the next, to pages that hold few rows or none and have a copy: whether they should
have more shows only in what their readers look at."""

SLOTS_AT_ONCE = 64
"""Part of the mass slots that are taken back at a time, so that not every new page sorts all that hold one."""

PAGES_AT_ONCE = 1024
"""Pages whose scores are gathered in one piece: 32 MiB at 32 layers of 8 heads."""


class MassLevels:
    """Lowers pages under pressure, and at each decision brings those that are read to the levels that they have earned: down, since
    every step reads the rows that they hold, or up, where the host store has a copy.

    Args:
        table, hot: pages and hot pool.
        parts: mass of pages.
        policy: says levels.
        interval: forwards from one decision to the next.
        hot_rows: rows that the pages which are read keep on average.
        demoted_to: int64 [32], counts pages by the level to which they fell.
        copies: where rows come back from; without it no page rises.
    """

    def __init__(
        self,
        table: PageTable,
        hot: HotPool,
        parts: MassParts,
        policy: Policy,
        interval: int,
        hot_rows: float,
        demoted_to: np.ndarray,
        copies: HostCopies | None = None,
    ):
        if interval <= LAG:
            raise ValueError(f"{interval} forwards between two decisions are too few: the mass of pages takes {LAG} to arrive")
        self.table = table
        self.hot, self.mass, self.heat, self.policy, self.interval = hot, parts.table, parts.heat, policy, interval
        self.heat.decay = 0.5 ** (interval / HALF_LIFE)
        self.slack = max(PAGE_BLOCKS, hot.capacity // SLACK_SHARE)
        self.kept = hot.capacity // SETTLED_SHARE
        self.hot_rows = hot_rows
        self.demoted_to = demoted_to
        self.copies = copies
        self._watched = np.zeros(table.count, dtype=np.int64)
        """Forward in which a page last got a slot so that its heat shows."""

    def observe(self, now: int, pages: Callable[[], np.ndarray]) -> None:
        """Once a forward, before its changes: at fixed counts, sum up what was read and decide by it.

        Args:
            now: count of the forward.
            pages: makes a list of the pages that it reads, int64 [N].
        """
        if now % self.interval == 0:
            self.heat.send(self.hot.row_masks)
        elif now % self.interval == LAG and self.heat.receive():
            self.make_room(self.slack, last_rows=True, kept=self.kept)
            read = self._distinct(pages())
            self._decide(read[self.table.sealed[read]])
            if self.copies:
                self.copies.host.touch(read, now)
                self._watch(self.copies, read, now)

    def track(self, pages: np.ndarray) -> None:
        """Pages that have become whole get slots; where there are none left, those of the coldest settled pages, fewest rows first."""
        missing = np.count_nonzero(self.mass.slots[pages] < 0) - self.mass.free_slots
        if missing > 0:
            holders = np.flatnonzero((self.mass.slots >= 0) & (self.hot.levels < PAGE_TOKENS))
            order = np.lexsort((holders, self._known(holders), np.minimum(self.hot.levels[holders], BLOCK_ROWS + 1)))
            self.mass.drop(holders[order[: max(missing, self.mass.capacity // SLOTS_AT_ONCE)]])
        self.mass.track(pages)

    def forget_cold(self, pages: np.ndarray) -> None:
        """Those of `pages` (int64 [N]) that hold no rows can get none any more: nothing is to be known of them."""
        self.mass.drop(pages[self.hot.levels[pages] == 0])

    def settle(self, pages: np.ndarray) -> None:
        """Whole pages (int64 [N]) that need not be whole: at the highest level while there is room, else all partial pages compete."""
        held = self.hot.levels[pages].astype(np.int64)
        # Rows of a page that nobody has watched are any rows.
        tracked = self.mass.slots[pages] >= 0
        highest = self.policy.settle(pages)
        freed = int(held.sum() - np.count_nonzero(tracked) * highest) // BLOCK_ROWS
        if self.hot.free_blocks + freed >= self.slack:
            self.lower(pages, np.where(tracked, highest, 0))
            return
        rivals = self._partial()
        all_pages = np.concatenate([rivals, pages[tracked]])
        levels = self.hot.levels[all_pages].astype(np.int64)
        owned = (int(self.hot.levels[rivals].sum()) + int(held.sum())) // BLOCK_ROWS
        blocks = max(self.hot.free_blocks + owned - self.slack, min(owned, self.kept))
        self.lower(pages[~tracked], np.zeros(np.count_nonzero(~tracked), dtype=np.int64))
        self.lower(all_pages, self.policy.levels(levels, self._mass(all_pages), blocks))

    def make_room(self, wanted: int, last_rows: bool, kept: int = 0) -> bool:
        """Let partial pages fall, the coldest first, until `wanted` blocks are free, and some more while it is at it.

        Args:
            last_rows: whether pages may fall from 2 rows to none, and sinks at all.
            kept: blocks that all of them keep together.

        Returns:
            Whether `wanted` blocks are free now.
        """
        hot = self.hot
        if hot.free_blocks >= wanted:
            return True
        pages = self._partial()
        held = hot.levels[pages].astype(np.int64)
        blocks = int(held.sum()) // BLOCK_ROWS
        lowest = np.zeros(len(pages), dtype=np.int64)
        if not last_rows:
            lowest[:] = np.where(self.table.position[pages] < SINK_PAGES, self.policy.settle(pages), BLOCK_ROWS)
        least = max(kept, int(np.minimum(lowest, held).sum()) // BLOCK_ROWS)
        left = max(blocks - (max(wanted, self.slack) - hot.free_blocks), least, 0)
        if left < blocks:
            self.lower(pages, self.policy.levels(held, self._mass(pages), left, lowest))
        return hot.free_blocks >= wanted

    def lower(self, pages: np.ndarray, levels: np.ndarray) -> None:
        """Bring pages to levels (int64 [N] each) that are not above their own: one launch for each level, not for each page."""
        changed = levels < self.hot.levels[pages]
        pages, levels = pages[changed], levels[changed]
        for level in np.unique(levels).tolist():
            group = pages[levels == level]
            self.demoted_to[level] += len(group)
            if level == 0:
                self.hot.release(group)
                self.mass.drop(group[~self.copies.host.holds(group)] if self.copies else group)
                continue
            for part in np.split(group, range(PAGES_AT_ONCE, len(group), PAGES_AT_ONCE)):
                self.hot.shrink(part, level, self.mass.row_scores(part))

    def _decide(self, read: np.ndarray) -> None:
        """Levels of pages that are read (int64 [N], distinct, sealed), under what they may hold together."""
        read = read[self.hot.levels[read] < PAGE_TOKENS]
        held = self.hot.levels[read].astype(np.int64)
        levels = self.policy.levels(held, self._mass(read), int(len(read) * self.hot_rows) // BLOCK_ROWS, reach=self._reach(read, held))
        self.lower(read, levels)
        rising = levels > held
        if rising.any():
            self._raise(read[rising], levels[rising])

    def _reach(self, pages: np.ndarray, held: np.ndarray) -> np.ndarray:
        """Levels to which pages can rise, int64 [N]: the highest for the hottest of those that have a copy and are watched, else none."""
        reach = held.copy()
        if self.copies:
            known = (self.mass.slots[pages] >= 0) & self.heat.measured[pages] & (self.heat.values[pages] > 0)
            highest = self.policy.settle(pages)
            able = np.flatnonzero(known & self.copies.host.holds(pages) & (held < highest))
            reach[able[np.argsort(-self.heat.values[pages[able]], kind="stable")[:MOST_RAISED]]] = highest
        return reach

    def _raise(self, risers: np.ndarray, wanted: np.ndarray) -> None:
        """Pages that have earned more rows (levels int64 [N]) compete for the pool with all that hold some; its slack stays free."""
        pages = np.union1d(self._partial(), risers)
        held = self.hot.levels[pages].astype(np.int64)
        reach = held.copy()
        reach[np.searchsorted(pages, risers)] = wanted
        blocks = int(held.sum()) // BLOCK_ROWS + max(0, self.hot.free_blocks - self.slack)
        levels = self.policy.levels(held, self._mass(pages), blocks, reach=reach)
        self.lower(pages, levels)
        rising = levels > held
        self._lift(self.copies, pages[rising], levels[rising])

    def _lift(self, copies: HostCopies, pages: np.ndarray, levels: np.ndarray) -> None:
        """Bring pages up to levels (int64 [N] each), the hottest first: whole from the host store, then down to their level."""
        order = np.argsort(-self.heat.values[pages], kind="stable")
        pages, levels = pages[order], levels[order]
        for level in np.unique(levels).tolist():
            left = pages[levels == level]
            while len(left) and len(raised := copies.raise_pages(left, level)):
                self.hot.shrink(raised, level, self.mass.row_scores(raised))
                left = left[len(raised) :]

    def _watch(self, copies: HostCopies, read: np.ndarray, now: int) -> None:
        """Slots for some of the pages that are read (int64 [N], distinct), have copies and are not watched, in turns."""
        able = read[(self.mass.slots[read] < 0) & copies.host.holds(read) & (self.hot.levels[read] < PAGE_TOKENS)]
        chosen = able[np.argsort(self._watched[able], kind="stable")[: self.mass.capacity // WATCHED_SHARE]]
        self._watched[chosen] = now
        if len(chosen):
            self.track(chosen)

    def _distinct(self, pages: np.ndarray) -> np.ndarray:
        """Each of `pages` once, in order; faster than sorting them."""
        named = np.zeros(self.table.count, dtype=bool)
        named[pages] = True
        return np.flatnonzero(named)

    def _partial(self) -> np.ndarray:
        return np.flatnonzero((self.hot.levels > 0) & (self.hot.levels < PAGE_TOKENS))

    def _mass(self, pages: np.ndarray) -> np.ndarray:
        """Mass of pages, guessed where it is not known: float64 [N]."""
        mass = self.heat.values[pages].astype(np.float64)
        unknown = np.isnan(mass)
        mean = mass[~unknown].mean() if not unknown.all() else 1.0
        guess = np.where(self.table.position[pages] < SINK_PAGES, UNKNOWN_SINK * mean, mean)
        return np.where(unknown, guess, mass)

    def _known(self, pages: np.ndarray) -> np.ndarray:
        """Known mass; pages of which nothing is known count as hottest."""
        return np.nan_to_num(self.heat.values[pages], nan=np.inf)
