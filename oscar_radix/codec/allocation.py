"""Reverse water-filling in widths that a kernel can read: which channels get 4, 3, 2, 1 or 0 bits."""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from oscar_radix.codec.packing import WIDTHS, Widths
from oscar_radix.codec.uniform import GAUSSIAN_MSE

CHANNEL_UNIT = 16
"""Widths change only every 16 channels, so that a segment fills whole tensor-core operands."""


def _falling(units: int, bits: int, highest: int) -> Iterator[tuple[int, ...]]:
    if units == 0:
        if bits == 0:
            yield ()
        return
    for width in range(min(highest, bits), -1, -1):
        if width * units < bits:
            return
        for rest in _falling(units - 1, bits - width, width):
            yield (width, *rest)


@lru_cache
def allocations(head_dim: int, bits: int) -> tuple[tuple[int, ...], ...]:
    """All falling sequences of widths, one per 16 channels, that add up to `bits` bits a row."""
    units = head_dim // CHANNEL_UNIT
    if head_dim % CHANNEL_UNIT or bits % CHANNEL_UNIT or not 0 <= bits <= WIDTHS[0] * head_dim:
        raise ValueError(
            f"{bits} bits over {head_dim} channels cannot be allocated: both must be multiples of {CHANNEL_UNIT}, "
            f"at most {WIDTHS[0]} bits a channel"
        )
    return tuple(_falling(units, bits // CHANNEL_UNIT, WIDTHS[0]))


def best_widths(variances: Tensor, bits: int) -> Widths:
    """The allocation that minimises sum_c variances_c * mse(width_c), by trying them all; `variances` [D] must fall."""
    head_dim = variances.numel()
    options = torch.tensor(allocations(head_dim, bits))
    mse = torch.tensor([GAUSSIAN_MSE[w] for w in range(WIDTHS[0] + 1)], dtype=torch.float64)
    error = mse[options] @ variances.to(torch.float64).view(-1, CHANNEL_UNIT).sum(-1)
    return Widths.from_per_channel(options[error.argmin()].repeat_interleave(CHANNEL_UNIT))
