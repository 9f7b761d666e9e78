"""Slots of the mass table have one owner; mass follows its page, decays, and is read per visit."""

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from oscar_radix.pool.mass import MassTable
from tests.helpers import GEOMETRY

PAGES, SLOTS = 12, 5


def table() -> MassTable:
    return MassTable(GEOMETRY, pages=PAGES, slots=SLOTS, device="cpu")


class Ownership(RuleBasedStateMachine):
    """Random tracking against a dictionary from page to the mass that was put there."""

    def __init__(self):
        super().__init__()
        self.table, self.model, self.stamp = table(), {}, 0.0

    @rule(pages=st.lists(st.integers(1, PAGES - 1), unique=True, max_size=PAGES))
    def track(self, pages):
        held = self.table.track(np.array(pages, dtype=np.int64))
        for page, has in zip(pages, held.tolist(), strict=True):
            assert has == (page in self.model or len(self.model) < SLOTS)
            if has:
                self.model.setdefault(page, 0.0)

    @rule(pages=st.lists(st.integers(1, PAGES - 1), unique=True, max_size=4))
    def drop(self, pages):
        self.table.drop(np.array(pages, dtype=np.int64))
        for page in pages:
            self.model.pop(page, None)

    @rule(source=st.integers(1, PAGES - 1), to=st.integers(1, PAGES - 1))
    def move(self, source, to):
        if source != to:
            self.table.move(source, to)
            self.model.pop(to, None)
            if source in self.model:
                self.model[to] = self.model.pop(source)

    @rule(page=st.integers(1, PAGES - 1))
    def add(self, page):
        if page in self.model:
            self.stamp += 1.0
            self.table.values[:, self.table.slots[page]] += self.stamp
            self.table.visits[self.table.slots[page]] += 2.0
            self.model[page] += self.stamp

    @rule()
    def clear(self):
        self.table.clear()
        self.model.clear()

    @invariant()
    def agrees(self):
        self.table.check_integrity()
        assert self.table.free_slots == SLOTS - len(self.model)
        expected = [self.model.get(page, 0.0) * GEOMETRY.layers * GEOMETRY.kv_heads * 32 for page in range(PAGES)]
        assert self.table.page_mass(np.arange(PAGES)).tolist() == expected


TestOwnership = Ownership.TestCase


def test_scores_are_mass_per_visit_and_decay_keeps_them():
    ours = table()
    ours.track(np.array([4, 7]))
    ours.values[:, ours.slots[4]] = 6.0
    ours.visits[ours.slots[4], :20] = 3.0
    for _ in range(2):
        scores = ours.row_scores(np.array([7, 4, 2]))
        assert scores.shape == (3, GEOMETRY.layers, GEOMETRY.kv_heads, 32)
        assert scores[1, ..., :20].eq(2.0).all()
        assert not scores[1, ..., 20:].any(), "no query could see them"
        assert not scores[[0, 2]].any()
        ours.decay(0.5)
    assert ours.visits[ours.slots[4], 0] == 0.75


def test_a_slot_comes_back_empty():
    ours = table()
    ours.track(np.arange(1, 6))
    ours.values += 1.0
    ours.visits += 1.0
    ours.drop(np.array([3]))
    assert ours.track(np.array([9])).all()
    assert not ours.row_scores(np.array([9])).any()
    assert not ours.visits[ours.slots[9]].any()


def test_tracking_twice_keeps_the_mass():
    ours = table()
    ours.track(np.array([2]))
    ours.values += 1.0
    assert ours.track(np.array([2, 3])).all()
    assert ours.page_mass(np.array([2, 3])).tolist() == [GEOMETRY.layers * GEOMETRY.kv_heads * 32, 0]


def test_a_table_without_slots_is_refused():
    with pytest.raises(ValueError, match="needs a slot at least, not 0"):
        MassTable(GEOMETRY, pages=4, slots=0, device="cpu")


def test_integrity_sees_a_lost_slot():
    ours = table()
    ours.free.take(1)
    with pytest.raises(RuntimeError, match=r"1 of 5 mass slots have \[0\] owners, not 1"):
        ours.check_integrity()


def test_bytes_are_what_the_formula_says():
    ours = table()
    assert ours.nbytes == SLOTS * MassTable.slot_bytes(GEOMETRY) + PAGES * 4
