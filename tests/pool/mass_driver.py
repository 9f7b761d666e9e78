"""Stores whose forwards are prepared but not run: conversations, their rows, and attention mass, by hand."""

import numpy as np
import torch

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.integrity import check_integrity
from oscar_radix.pool.pages import Owner
from oscar_radix.pool.store import KVStore
from oscar_radix.sequence import Sequence
from tests.helpers import make_store, page_count
from tests.mini_server import TINY

RECENT = 64


class Driver:
    """Conversations in a store whose forwards are prepared but not run; mass is put into the table by hand."""

    def __init__(self, hot_pages: int, interval: int = 8, pages: int = 200, geometry=TINY, host_pages: int = 0, hot_rows: float = 8.0):
        sizes = {"policy_interval": interval, "host_pages": host_pages, "hot_rows": hot_rows}
        self.store: KVStore = make_store(pages, hot_pages, "attention", RECENT, geometry=geometry, **sizes)
        self.table = self.store.mass.table
        self._salts = np.zeros(pages + 1, dtype=np.int64)
        """What tells the rows of a page from those of others and of its earlier lives."""

    def begin(self, tokens: int) -> np.ndarray:
        """Prefill in one forward, on the lowest free pages, and end the prompt."""
        pages = (np.flatnonzero(self.store.table.owner[1:] == Owner.FREE) + 1)[: page_count(tokens)]
        self.store.allocate(pages)
        self._run([Sequence(pages, 0, tokens, False)])
        self.store.end_prefill(pages)
        return pages

    def follow(self, prefix: np.ndarray, tokens: int) -> np.ndarray:
        """Another reader of whole pages `prefix` prefills that many tokens of its own; all its pages."""
        own = (np.flatnonzero(self.store.table.owner[1:] == Owner.FREE) + 1)[: page_count(tokens)]
        self.store.allocate(own)
        pages, cached = np.concatenate([prefix, own]), len(prefix) * PAGE_TOKENS
        self._run([Sequence(pages, cached, cached + tokens, False)])
        self.store.end_prefill(pages)
        return pages

    def read(self, pages: np.ndarray, forwards: int = 1) -> None:
        """Decode steps behind these whole pages, on the page of `step`."""
        if not hasattr(self, "own"):
            self.own = self.begin(1)
        for _ in range(forwards):
            tokens = len(pages) * PAGE_TOKENS
            self._run([Sequence(np.concatenate([pages, self.own]), tokens, tokens + 1, True)])

    def _run(self, sequences: list[Sequence]) -> None:
        """Prepare a forward and write the rows of the pages that are new in it."""
        self.store.residency.prepare(sequences)
        hot = self.store.hot
        for sequence in sequences:
            for page in [] if sequence.decode else sequence.written.tolist():
                self._salts[page] += 37
                if hot.levels[page]:
                    hot.k_rows[:, hot.block_table[page]] = self._rows(page, np.arange(PAGE_TOKENS)).view(-1, 1, 2, 1)

    def _rows(self, page: int, tokens: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(((self._salts[page] + 11 * page + 5 * tokens) % 251 - 125).astype(np.int8))

    def leave(self, pages: np.ndarray) -> None:
        """No window holds these pages any more."""
        self.store.table.window[pages] = False
        self.store.residency.marks.forget()

    def step(self, forwards: int = 1) -> None:
        """Decode steps of a conversation of one page that nobody counts."""
        if not hasattr(self, "own"):
            self.own = self.begin(1)
        for _ in range(forwards):
            self._run([Sequence(self.own, 1, 2, True)])

    def add_mass(self, page: int, mass: float) -> None:
        """Spread evenly over a page's tokens, seen by one query each."""
        slot = self.table.slots[page]
        assert slot >= 0
        geometry = self.store.geometry
        self.table.values[:, slot] += mass / (geometry.layers * geometry.kv_heads * PAGE_TOKENS)
        self.table.visits[slot] += 1

    def check(self) -> None:
        owner = self.store.table.owner
        free, tree = (np.flatnonzero(owner[1:] == value) + 1 for value in (Owner.FREE, Owner.TREE))
        check_integrity(self.store, free, tree)
        hot = self.store.hot
        for page in np.flatnonzero(hot.levels).tolist():
            blocks = torch.from_numpy(hot.block_table[page, : hot.levels[page] // 2].astype(np.int64))
            for layer in range(len(hot.k_rows)):
                for head in range(hot.k_rows.shape[2]):
                    numbers = hot.row_numbers[layer, blocks, head].reshape(-1).numpy()
                    rows = hot.k_rows[layer, blocks, head, :, 0].reshape(-1)
                    assert torch.equal(rows, self._rows(page, numbers)), f"rows of page {page} at level {hot.levels[page]}"
                    assert int(hot.row_masks[layer, page, head]) & 0xFFFFFFFF == sum(1 << number for number in numbers.tolist())

    def levels(self, pages: np.ndarray) -> list[int]:
        return self.store.hot.levels[pages].tolist()


class Ranks:
    """Two ranks with their own heads' mass, which add up page by page before they decide."""

    def __init__(self, hot_pages: int, interval: int, **sizes):
        self.ranks = [Driver(hot_pages, interval, **sizes) for _ in range(2)]
        self._sums: dict[int, torch.Tensor] = {}
        for rank in self.ranks:
            rank.store.mass.heat.reduce = self.reduce

    def reduce(self, own: torch.Tensor) -> torch.Tensor:
        """What all-reduce gives: both ranks' sums, as they are when the first of them asks."""
        now = max(rank.store.residency.now for rank in self.ranks)
        if now not in self._sums:
            tables = [(rank.table, rank.store.hot) for rank in self.ranks]
            self._sums = {now: sum(torch.cat([table.slot_mass(), table.covered_mass(hot.row_masks)]) for table, hot in tables)}
        return self._sums[now].clone()

    def both(self, act) -> np.ndarray:
        """Do the same on both, one forward at most."""
        result, _ = (act(rank) for rank in self.ranks)
        return result

    def add_mass(self, seed: int) -> None:
        """Different on each rank."""
        generator = np.random.default_rng(seed)
        for rank in self.ranks:
            for page in np.flatnonzero(rank.table.slots >= 0).tolist():
                rank.add_mass(page, float(generator.exponential()))
