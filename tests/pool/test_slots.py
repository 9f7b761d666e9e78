"""extend_slots against a loop over tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.slots import extend_slots, pages_for_extend

sequences = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)), min_size=1, max_size=5)


def loop(prefix_lens: list[int], seq_lens: list[int], last_slots: list[int], new_pages: list[int]) -> list[int]:
    """Token by token: the next slot of the page, or the first slot of the next new page."""
    slots, pages = [], iter(new_pages)
    for prefix, length, slot in zip(prefix_lens, seq_lens, last_slots, strict=True):
        for position in range(prefix, length):
            slot = next(pages) * PAGE_TOKENS if position % PAGE_TOKENS == 0 else slot + 1
            slots.append(slot)
    assert next(pages, None) is None, "pages_for_extend asked for more pages than are needed"
    return slots


@settings(max_examples=300)
@given(sequences=sequences, seed=st.integers(0, 1000))
def test_against_the_loop(sequences, seed):
    prefix_lens = [prefix for prefix, _ in sequences]
    seq_lens = [prefix + grow for prefix, grow in sequences]
    numbers = (torch.randperm(200, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    # Where a sequence has no partial page its last slot is not read: any number will do.
    last = [
        numbers.pop() * PAGE_TOKENS + (prefix - 1) % PAGE_TOKENS if prefix % PAGE_TOKENS else -1 for prefix in prefix_lens
    ]
    as_tensor = torch.tensor
    needed = pages_for_extend(as_tensor(prefix_lens), as_tensor(seq_lens))
    new_pages = numbers[:needed]
    slots = extend_slots(as_tensor(prefix_lens), as_tensor(seq_lens), as_tensor(last), torch.tensor(new_pages, dtype=torch.int64))
    assert slots.tolist() == loop(prefix_lens, seq_lens, last, new_pages)
    assert slots.dtype == torch.int64


def test_a_decode_step_within_a_page_needs_no_new_page():
    assert pages_for_extend(torch.tensor([5, 33]), torch.tensor([6, 34])) == 0
    slots = extend_slots(torch.tensor([5, 33]), torch.tensor([6, 34]), torch.tensor([100, 64]), torch.zeros(0, dtype=torch.int64))
    assert slots.tolist() == [101, 65]


def test_a_decode_step_over_the_end_of_a_page_takes_one():
    assert pages_for_extend(torch.tensor([32]), torch.tensor([33])) == 1
    assert extend_slots(torch.tensor([32]), torch.tensor([33]), torch.tensor([63]), torch.tensor([9])).tolist() == [288]
