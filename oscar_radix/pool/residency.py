"""Which pages hold hot rows: decided on the host once a forward, before its kernels run."""

from collections.abc import Callable

import numpy as np
import torch

from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.policy.base import Policy
from oscar_radix.pool.decode_marks import DecodeMarks
from oscar_radix.pool.host_copies import HostCopies
from oscar_radix.pool.hot_pool import PAGE_BLOCKS, HotPool
from oscar_radix.pool.mass_levels import MassLevels, MassParts
from oscar_radix.pool.pages import PageTable
from oscar_radix.pool.request_pages import DecodeStep
from oscar_radix.pool.victims import PREFILLING, SETTLED, SINK, SINK_IN_USE, Victims
from oscar_radix.sequence import SINK_PAGES, Sequence

VICTIMS_AT_ONCE = 8
"""Pages of prompts in progress that are lowered in one launch."""


class Residency:
    """Marks windows, lets the policy settle what left them, and finds blocks for what enters them.

    Args:
        geometry: attention shape of this rank.
        table, hot: pages and hot pool.
        policy: settles pages that leave every window.
        recent_tokens: W.
        mass: attention mass of pages, for a policy that goes by it.
        interval: forwards between two decisions of such a policy.
        hot_rows: rows that pages which are read keep on average under such a policy.
        copies: copies of pages in host memory, if there are any.
    """

    def __init__(
        self,
        geometry: Geometry,
        table: PageTable,
        hot: HotPool,
        policy: Policy,
        recent_tokens: int,
        mass: MassParts | None,
        interval: int,
        hot_rows: float,
        copies: HostCopies | None,
    ):
        self.geometry = geometry
        self.table = table
        self.hot = hot
        self.policy = policy
        self.recent_tokens = recent_tokens
        self.marks = DecodeMarks(table, recent_tokens)
        self.now = 0
        self.demoted_to = np.zeros(PAGE_TOKENS, dtype=np.int64)
        """Pages that fell to each level, by the level."""
        self.copies = copies
        self.by_mass = MassLevels(table, hot, mass, policy, interval, hot_rows, self.demoted_to, copies) if mass else None
        self.sealed_without_hot_rows = 0
        self._acquired: list[int] = []

    def prepare(self, sequences: list[Sequence]) -> None:
        """Bring the hot pool to the state that this forward reads and writes.

        Raises:
            RuntimeError: when not even the partial last pages of the sequences fit; the pool is sized so that they do.
        """
        self._begin(lambda: np.concatenate([sequence.pages for sequence in sequences]))
        self.marks.forget()
        starting = self._mark(sequences)
        self._settle()
        victims = self._victims()
        for sequence in sequences:
            self._fill(sequence.pages[sequence.seq_len // PAGE_TOKENS :], victims, len(sequences))
        if self.copies:
            self._restore(self.copies, starting, victims)
        for sequence in sequences:
            self._complete(self._by_need(sequence.completed), victims)
        # Only now: a page whose record is not written yet must not be anybody's victim.
        self._seal(np.concatenate([sequence.completed for sequence in sequences]))
        self._end()

    def prepare_decode(self, step: DecodeStep) -> None:
        """`prepare` for the sequences of a decode step; cheap where nothing but their lengths has changed since the last step.

        Raises:
            RuntimeError: as `prepare`.
        """
        self._begin(step.pages)
        self._settle(self.marks.mark(step, self.now))
        victims = self._victims()
        newest = step.requests.pages[step.rows, (step.lengths - 1) // PAGE_TOKENS]
        full = step.lengths % PAGE_TOKENS == 0
        self._fill(newest[~full], victims, len(newest))
        self._complete(newest[full], victims)
        self._seal(newest[full])
        self._end()

    def _begin(self, pages: Callable[[], np.ndarray]) -> None:
        """`pages` makes a list of all pages of this forward."""
        self.now += 1
        uncopied = self.copies.begin(self.now) if self.copies else ()
        if self.by_mass:
            if len(uncopied):
                self.by_mass.forget_cold(uncopied)
            self.by_mass.observe(self.now, pages)

    def _seal(self, pages: np.ndarray) -> None:
        self.table.sealed[pages] = True
        if self.copies:
            self.copies.sealed(pages)

    def _end(self) -> None:
        self.hot.sync_tables()
        if self.copies:
            self.copies.end()
        if self.by_mass and self._acquired:
            self.by_mass.track(np.array(self._acquired, dtype=np.int64))
        self._acquired.clear()

    def _fill(self, pages: np.ndarray, victims: Victims, sequences: int) -> None:
        """Find blocks for pages that stay partial, at any price."""
        for page in pages[self.hot.levels[pages] == 0].tolist():
            if not self._acquire(page, victims, SINK_IN_USE):
                raise RuntimeError(
                    f"the hot pool of {self.hot.capacity} blocks is full of unsealed pages: {sequences} sequences need one "
                    f"page of 16 blocks each; lower --max-running-requests or raise --oscar-hot-fraction"
                )

    def _complete(self, pages: np.ndarray, victims: Victims) -> None:
        """Find blocks for pages that become full; without them a page is sealed from its rows all the same.

        A page must have been hot once for its rows to be chosen by mass, so earlier pages of prompts make room then."""
        lowest = PREFILLING if self.by_mass else SETTLED
        for page in pages[self.hot.levels[pages] == 0].tolist():
            if not self._acquire(page, victims, SINK if self.table.window[page] else lowest):
                self.sealed_without_hot_rows += 1

    def _restore(self, copies: HostCopies, sequences: list[Sequence], victims: Victims) -> None:
        """Sinks and windows of sequences that continue from a match come back from the host store, as far as others can make room."""
        for sequence in sequences:
            copies.host.touch(sequence.pages, self.now)
            sinks = sequence.pages[: min(SINK_PAGES, sequence.prefix_len // PAGE_TOKENS)]
            pages = self._by_need(np.union1d(sinks, sequence.matched_end(self.recent_tokens)))
            pages = pages[(self.hot.levels[pages] < PAGE_TOKENS) & copies.host.holds(pages)]
            raised = copies.raise_pages(pages, PAGE_TOKENS, lambda: self._give_way(victims, SINK))
            self._acquired.extend(raised.tolist())

    def _mark(self, sequences: list[Sequence]) -> list[Sequence]:
        """Mark the pages of all sequences; returns those that continue from a match."""
        table, starting = self.table, []
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
                    starting.append(sequence)
        for sequence in sequences:
            window = sequence.window(self.recent_tokens)
            table.window[window] = True
            table.last_use[window] = self.now
            if not sequence.decode:
                table.prefilling[sequence.written] = True
                table.last_use[sequence.written] = self.now
        return starting

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
        if self.copies and (busy := self.copies.busy[pages]).any():
            # A page that is being copied settles in the next forward, which need not wait for it.
            pages = pages[~busy]
            self.marks.forget()
        if not len(pages):
            return
        if self.by_mass:
            self.by_mass.settle(pages)
        elif (level := self.policy.settle(pages)) < PAGE_TOKENS:
            self._lower(pages, level)

    def demote(self, page: int, level: int) -> None:
        """Lower a sealed page to `level`; nothing but hot rows is lost."""
        self._lower(np.array([page]), level)

    def _lower(self, pages: np.ndarray, level: int) -> None:
        """Lower sealed pages (int64 [N]) that hold more rows to one level, in one launch."""
        if self.by_mass:
            self.by_mass.lower(pages, np.full(len(pages), level))
        elif level == 0:
            self.demoted_to[0] += len(pages)
            self.hot.release(pages)
        else:
            self.demoted_to[level] += len(pages)
            geometry = self.geometry
            chosen = [self.policy.choose_rows(page, level, geometry.layers, geometry.kv_heads, PAGE_TOKENS) for page in pages.tolist()]
            scores = torch.zeros(len(pages), geometry.layers, geometry.kv_heads, PAGE_TOKENS).scatter_(-1, torch.stack(chosen), 1.0)
            self.hot.shrink(pages, level, scores.to(self.hot.device))
        if level == 0:
            self.table.continuation[pages] = False

    @property
    def demotions(self) -> int:
        """Pages that fell, to whatever level."""
        return int(self.demoted_to.sum())

    def _by_need(self, pages: np.ndarray) -> np.ndarray:
        """Pages that are being filled: sinks first, then the window and then the rest, each from the newest back."""
        sink, window = self.table.position[pages] < SINK_PAGES, self.table.window[pages]
        return pages[np.lexsort((-self.table.position[pages], ~window, ~sink))]

    def _victims(self) -> Victims:
        return Victims(self.table, self.hot, self.policy, self.now, whole_pages=self.by_mass is not None)

    def _acquire(self, page: int, victims: Victims, highest: int) -> bool:
        while not self.hot.acquire(page):
            if not self._give_way(victims, highest):
                return False
        self._acquired.append(page)
        return True

    def _give_way(self, victims: Victims, highest: int) -> bool:
        """Take hot rows from somebody; False when nobody up to class `highest` has any."""
        if self.by_mass:
            return self._give_way_by_mass(self.by_mass, victims, highest)
        victim = victims.take(highest)
        if victim is not None:
            self.demote(victim, 0)
        return victim is not None

    def _give_way_by_mass(self, levels: MassLevels, victims: Victims, highest: int) -> bool:
        """Rows of settled pages go first, but a prompt in progress takes nobody's last two, and a share of them stays before ends and
        sinks of conversations that are not running. Pages that must not stay whole keep the rows that are read."""
        if levels.make_room(PAGE_BLOCKS, last_rows=False):
            return True
        pages = victims.take_up_to(VICTIMS_AT_ONCE, PREFILLING)
        if not pages and highest > PREFILLING:
            if levels.make_room(PAGE_BLOCKS, last_rows=True, kept=levels.kept):
                return True
            pages = victims.take_up_to(1, SINK)
            if not pages and levels.make_room(PAGE_BLOCKS, last_rows=True):
                return True
            pages = pages or victims.take_up_to(1, highest)
        if pages:
            self.table.continuation[pages] = False
            levels.settle(np.array(pages))
        return bool(pages)
