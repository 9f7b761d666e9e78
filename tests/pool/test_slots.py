"""extend_slots and decode_slots against a loop over tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.slots import decode_slots, extend_slots, pages_for_extend

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
    slots = extend_slots(
        as_tensor(prefix_lens),
        as_tensor(seq_lens),
        as_tensor(last),
        torch.tensor(new_pages, dtype=torch.int64),
        sum(seq_lens) - sum(prefix_lens),
    )
    assert slots.tolist() == loop(prefix_lens, seq_lens, last, new_pages)
    assert slots.dtype == torch.int64


@settings(max_examples=300)
@given(lengths=st.lists(st.integers(2, 100), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_decode_is_an_extend_by_one_token(lengths, seed):
    numbers = (torch.randperm(200, generator=torch.Generator().manual_seed(seed)) + 1).tolist()
    prefixes = [length - 1 for length in lengths]
    last = [numbers.pop() * PAGE_TOKENS + (prefix - 1) % PAGE_TOKENS for prefix in prefixes]
    new_pages = numbers[: pages_for_extend(torch.tensor(prefixes), torch.tensor(lengths))]
    pages = torch.tensor(new_pages, dtype=torch.int64)
    slots = decode_slots(torch.tensor(lengths), torch.tensor(last, dtype=torch.int32), pages)
    assert slots.tolist() == loop(prefixes, lengths, last, new_pages)
    assert slots.dtype == torch.int64
