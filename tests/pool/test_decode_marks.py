"""`prepare_decode` does what `prepare` does for the same sequences, step by step, on two stores that are driven alike."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.pool.request_pages import DecodeStep
from oscar_radix.pool.store import KVStore
from oscar_radix.sequence import Sequence
from tests.helpers import make_store, page_count

TINY = Geometry(layers=1, kv_heads=1, query_heads=1, head_dim=64)
COLUMNS = ("owner", "sealed", "window", "continuation", "prefilling", "last_use", "position")


class Twins:
    """One store gets sequences, the other decode steps; conversations may share their first pages."""

    def __init__(self, hot_pages: int, policy: str, recent_pages: int, host_pages: int = 0):
        self.by_sequences, self.by_steps = (
            make_store(200, hot_pages, policy, recent_pages * PAGE_TOKENS, geometry=TINY, host_pages=host_pages) for _ in range(2)
        )
        self.lists: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.marked_all = 0
        self._next = 1

    @property
    def stores(self) -> tuple[KVStore, KVStore]:
        return self.by_sequences, self.by_steps

    def take(self, count: int) -> np.ndarray:
        pages = np.arange(self._next, self._next + count)
        self._next += count
        for store in self.stores:
            store.allocate(pages)
        return pages

    def begin(self, shared: np.ndarray, tokens: int) -> None:
        """Prefill `tokens` tokens after shared pages."""
        prefix = len(shared) * PAGE_TOKENS
        pages = np.concatenate([shared, self.take(page_count(tokens))])
        for store in self.stores:
            store.residency.prepare([Sequence(pages, prefix, prefix + tokens, False)])
        self.by_steps.requests.put(len(self.lists), 1, pages)
        self.lists.append(pages)
        self.lengths.append(prefix + tokens)

    def decode(self, chosen: list[int]) -> None:
        for i in chosen:
            self.lengths[i] += 1
            if self.lengths[i] % PAGE_TOKENS == 1:
                page = self.take(1)
                self.lists[i] = np.concatenate([self.lists[i], page])
                self.by_steps.requests.append(np.array([i]), page)
        lengths = np.array([self.lengths[i] for i in chosen])
        step = DecodeStep(self.by_steps.requests, np.array(chosen), lengths)
        assert step.pages().tolist() == np.concatenate([self.lists[i] for i in chosen]).tolist()
        self.by_sequences.residency.prepare([Sequence(self.lists[i], self.lengths[i] - 1, self.lengths[i], True) for i in chosen])
        self.by_steps.residency.prepare_decode(step)

    def check(self) -> None:
        one, two = self.stores
        for column in COLUMNS:
            assert np.array_equal(getattr(one.table, column), getattr(two.table, column)), column
        assert np.array_equal(one.hot.levels, two.hot.levels)
        assert np.array_equal(one.hot.block_table, two.hot.block_table)
        assert one.residency.demotions == two.residency.demotions
        assert one.residency.sealed_without_hot_rows == two.residency.sealed_without_hot_rows
        if one.copies:
            assert np.array_equal(one.copies.host.slots, two.copies.host.slots)
        two.hot.check_integrity()


@settings(max_examples=60)
@given(
    data=st.data(),
    hot_pages=st.integers(8, 40),
    policy=st.sampled_from(["none", "window", "random", "attention"]),
    recent_pages=st.integers(1, 3),
    host_pages=st.sampled_from([0, 8, 200]),
)
def test_twins_stay_alike(data, hot_pages, policy, recent_pages, host_pages):
    twins = Twins(hot_pages, policy, recent_pages, host_pages)
    twins.begin(np.zeros(0, dtype=np.int64), data.draw(st.integers(1, 300)))
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["begin", "decode", "decode", "decode", "tree", "demote"]))
        if action == "begin" and len(twins.lists) < 4:
            full = twins.lists[0][: twins.lengths[0] // PAGE_TOKENS]
            twins.begin(full[: data.draw(st.integers(0, len(full)))], data.draw(st.integers(1, 200)))
        elif action == "decode":
            chosen = data.draw(st.lists(st.integers(0, len(twins.lists) - 1), min_size=1, unique=True))
            for _ in range(data.draw(st.integers(1, 70))):
                twins.decode(chosen)
                twins.check()
        elif action == "tree":
            i = data.draw(st.integers(0, len(twins.lists) - 1))
            full = twins.lists[i][: twins.lengths[i] // PAGE_TOKENS]
            for store in twins.stores:
                store.end_prefill(full)
                store.set_continuation_points(full, [len(full)], recent_pages)
        elif action == "demote":
            hot = np.flatnonzero(twins.by_steps.table.sealed & (twins.by_steps.hot.levels > 0)).tolist()
            for page in data.draw(st.lists(st.sampled_from(hot), max_size=4, unique=True)) if hot else []:
                for store in twins.stores:
                    store.residency.demote(page, 0)
        twins.check()


def test_a_step_like_the_last_one_looks_at_nothing_but_moved_windows(monkeypatch):
    twins = Twins(hot_pages=40, policy="none", recent_pages=2)
    for _ in range(3):
        twins.begin(np.zeros(0, dtype=np.int64), 200)
    marks, calls = twins.by_steps.residency.marks, []
    original = type(marks)._unmark
    monkeypatch.setattr(type(marks), "_unmark", lambda *args: calls.append(1) or original(*args))
    for _ in range(100):
        twins.decode([0, 1, 2])
    assert len(calls) == 1
    twins.decode([0, 2])
    twins.decode([0, 1, 2])
    assert len(calls) == 3
    twins.check()
