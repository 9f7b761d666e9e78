"""int8 rows: what every token is written as first, and the only source of 2-bit records."""

import torch
from torch import Tensor

LEVELS = 127

LARGEST_VALUE = 32768.0
"""Rows with larger values are bad: fp16 operands of the kernels must not overflow."""


def quantise_rows(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 rows [..., D] to (int8 codes [..., D], fp16 scale [...] = absmax/127, bool bad [...]).

    A row with NaN, Inf or a value beyond LARGEST_VALUE becomes zeros with scale 0 and is marked bad.
    """
    largest = y.abs().amax(-1)
    bad = ~(largest <= LARGEST_VALUE)
    scale = (largest / LEVELS).to(torch.float16).masked_fill(bad, 0)
    divisor = scale.float().unsqueeze(-1)
    codes = torch.round(y / divisor).clamp_(-LEVELS, LEVELS)
    return codes.masked_fill_((divisor == 0) | bad.unsqueeze(-1), 0).to(torch.int8), scale, bad


def dequantise_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """(int8 [..., D], fp16 [...]) to float32 [..., D]."""
    return codes.float() * scale.float().unsqueeze(-1)
