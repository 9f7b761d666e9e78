"""Reverse water-filling in widths that share nibbles: as many 4-bit channels as 0-bit ones, as many 3-bit as 1-bit.

Every such allocation has 2 bits a channel on average and is read by one shift and one mask (see `packing`). On SmolLM2 the best
of them makes 6 % less error than the best free choice of widths in multiples of 16 channels, and 2 % more than the best choice
without any constraint.
"""

import torch
from torch import Tensor

from oscar_radix.codec.packing import PLANES
from oscar_radix.codec.uniform import GAUSSIAN_MSE

CHANNEL_UNIT = 2
"""4-bit and 3-bit channels come in twos, so that the two nibbles of a byte are alike."""


def best_counts(variances: Tensor) -> Tensor:
    """How many channels of each head have 4 and 3 bits: int64 [..., 2].

    Minimises sum_c variances_c * mse(width_c) over all allocations, by trying them all.

    Args:
        variances: float64 [..., D], falling along the last axis.
    """
    dim = variances.shape[-1]
    below = torch.cat((torch.zeros_like(variances[..., :1]), variances.cumsum(-1)), -1)
    best = torch.full(variances.shape[:-1], torch.inf, dtype=variances.dtype)
    counts = torch.zeros(*variances.shape[:-1], 2, dtype=torch.int64)
    for fours in range(0, dim // 2 + 1, CHANNEL_UNIT):
        for threes in range(0, dim // 2 - fours + 1, CHANNEL_UNIT):
            edges = (0, fours, fours + threes, dim - fours - threes, dim - fours, dim)
            error = sum(
                GAUSSIAN_MSE[width] * (below[..., edges[4 - width + 1]] - below[..., edges[4 - width]]) for width in range(4, -1, -1)
            )
            better = error < best
            best = torch.where(better, error, best)
            counts[better] = torch.tensor([fours, threes])
    return counts


def place(fours: int, threes: int, dim: int) -> tuple[Tensor, Tensor]:
    """Which channel goes where in a row.

    Args:
        fours, threes: numbers of 4-bit and 3-bit channels, multiples of 2.
        dim: channels D of a row.

    Returns:
        order int64 [D]: place p of a row holds the channel of rank order[p], rank 0 having the largest variance;
        widths int64 [D], of the places.
    """
    if fours % CHANNEL_UNIT or threes % CHANNEL_UNIT or not 0 <= fours + threes <= dim // 2:
        raise ValueError(
            f"{fours} channels of 4 bits and {threes} of 3 do not fit {dim} channels: even numbers, at most {dim // 2} together"
        )
    size = dim // PLANES
    kind = torch.full((size,), 2)
    kind[: fours // 2] = 4
    kind[fours // 2 : (fours + threes) // 2] = 3
    widths = torch.empty(PLANES, size, dtype=torch.int64)
    widths[0::2] = kind
    widths[1::2] = 4 - kind
    widths = widths.flatten()
    order = torch.empty(dim, dtype=torch.int64)
    order[torch.sort(widths, descending=True, stable=True).indices] = torch.arange(dim)
    return order, widths
