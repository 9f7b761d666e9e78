"""Slot numbers for new tokens, in plain torch on any device."""

import torch

from oscar_radix.geometry import PAGE_TOKENS


def pages_for_extend(prefix_lens: torch.Tensor, seq_lens: torch.Tensor) -> int:
    """New pages that sequences growing from prefix_lens to seq_lens (int64 [B], on the host) need beyond their partial last pages."""
    return int((_ceil_pages(seq_lens) - _ceil_pages(prefix_lens)).sum())


def extend_slots(prefix_lens: torch.Tensor, seq_lens: torch.Tensor, last_slots: torch.Tensor, new_pages: torch.Tensor) -> torch.Tensor:
    """Slots of the new tokens of a batch, sequence after sequence.

    A sequence first fills its partial last page, then takes whole pages from `new_pages` in order.

    Args:
        prefix_lens, seq_lens: int64 [B], tokens before and after.
        last_slots: int64 [B], slot of token prefix_len - 1; not read where prefix_len is a page multiple.
        new_pages: int64, at least as many as `pages_for_extend` says.

    Returns:
        int64 [sum(seq_lens - prefix_lens)].
    """
    lengths = seq_lens - prefix_lens
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    starts = torch.cumsum(lengths, 0) - lengths
    position = torch.arange(len(sequence), device=lengths.device) - starts[sequence] + prefix_lens[sequence]
    first_new = _ceil_pages(prefix_lens)
    needed = _ceil_pages(seq_lens) - first_new
    page_start = torch.cumsum(needed, 0) - needed
    in_new = position // PAGE_TOKENS - first_new[sequence]
    if not len(new_pages):
        return last_slots[sequence] + 1 + position - prefix_lens[sequence]
    fresh = new_pages[(page_start[sequence] + in_new).clamp(0, len(new_pages) - 1)] * PAGE_TOKENS + position % PAGE_TOKENS
    return torch.where(in_new < 0, last_slots[sequence] + 1 + position - prefix_lens[sequence], fresh)


def _ceil_pages(tokens: torch.Tensor) -> torch.Tensor:
    return (tokens + PAGE_TOKENS - 1) // PAGE_TOKENS
