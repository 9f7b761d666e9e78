"""Slot numbers for new tokens, in plain torch on any device; nothing here waits for the device."""

import torch

from oscar_radix.geometry import PAGE_TOKENS


def pages_for_extend(prefix_lens: torch.Tensor, seq_lens: torch.Tensor) -> int:
    """New pages that sequences growing from prefix_lens to seq_lens (int64 [B], on the host) need beyond their partial last pages."""
    return int((_ceil_pages(seq_lens) - _ceil_pages(prefix_lens)).sum())


def extend_slots(
    prefix_lens: torch.Tensor, seq_lens: torch.Tensor, last_slots: torch.Tensor, new_pages: torch.Tensor, count: int
) -> torch.Tensor:
    """Slots of the new tokens of a batch, sequence after sequence.

    A sequence first fills its partial last page, then takes whole pages from `new_pages` in order.

    Args:
        prefix_lens, seq_lens: int64 [B], tokens before and after.
        last_slots: int64 [B], slot of token prefix_len - 1; not read where prefix_len is a page multiple.
        new_pages: int64, at least as many as `pages_for_extend` says.
        count: sum(seq_lens - prefix_lens), as the host knows it.

    Returns:
        int64 [count].
    """
    lengths = seq_lens - prefix_lens
    # Without `output_size` torch would wait for the lengths to learn it.
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=count)
    starts = torch.cumsum(lengths, 0) - lengths
    position = torch.arange(count, device=lengths.device) - starts[sequence] + prefix_lens[sequence]
    first_new = _ceil_pages(prefix_lens)
    needed = _ceil_pages(seq_lens) - first_new
    page_start = torch.cumsum(needed, 0) - needed
    in_new = position // PAGE_TOKENS - first_new[sequence]
    if not len(new_pages):
        return last_slots[sequence] + 1 + position - prefix_lens[sequence]
    fresh = new_pages[(page_start[sequence] + in_new).clamp(0, len(new_pages) - 1)] * PAGE_TOKENS + position % PAGE_TOKENS
    return torch.where(in_new < 0, last_slots[sequence] + 1 + position - prefix_lens[sequence], fresh)


def decode_slots(seq_lens: torch.Tensor, last_slots: torch.Tensor, new_pages: torch.Tensor) -> torch.Tensor:
    """Slot of one new token for each sequence: int64 [B].

    Args:
        seq_lens: int64 [B], tokens with the new one.
        last_slots: integers [B], slot of the token before it.
        new_pages: int64, one for each sequence whose new token begins a page, in order.
    """
    following = last_slots.to(torch.int64) + 1
    if not len(new_pages):
        return following
    begins = seq_lens % PAGE_TOKENS == 1
    place = (torch.cumsum(begins, 0) - 1).clamp(min=0)
    return torch.where(begins, new_pages[place.clamp(max=len(new_pages) - 1)] * PAGE_TOKENS, following)


def _ceil_pages(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens + PAGE_TOKENS - 1) // PAGE_TOKENS
