"""FreeList against a plain list."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.pool.free_list import FreeList


@settings(max_examples=200)
@given(data=st.data(), size=st.integers(0, 30))
def test_against_a_plain_list(data, size):
    free, model, held = FreeList(np.arange(1, size + 1)), list(range(1, size + 1)), []
    for _ in range(data.draw(st.integers(0, 20))):
        if data.draw(st.booleans()):
            count = data.draw(st.integers(0, len(model)))
            taken = free.take(count)
            assert taken.tolist() == model[:count]
            model, held = model[count:], held + model[:count]
        else:
            back = data.draw(st.lists(st.sampled_from(held), unique=True)) if held else []
            free.give_back(np.array(back, dtype=np.int64))
            model, held = back + model, [page for page in held if page not in back]
        assert free.numbers.tolist() == model
        assert len(free) == len(model)


def test_pages_that_it_did_not_begin_with_find_room():
    free = FreeList(np.array([4]))
    free.give_back(np.array([7, 9]))
    assert free.numbers.tolist() == [7, 9, 4]


def test_taking_too_many_says_so():
    with pytest.raises(ValueError, match="3 wanted, 2 are free"):
        FreeList(np.array([1, 2])).take(3)
