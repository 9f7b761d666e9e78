"""int8 rows: what every token is written as first, and the only source of 2-bit records."""

import torch
from torch import Tensor

LEVELS = 127


def quantise_rows(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 rows [..., D] to (int8 codes [..., D], fp16 scale [...] = absmax/127, bool bad [...]).

    A row that no fp16 scale can represent (NaN, Inf, absmax above 8.3e6) becomes zeros with scale 0 and is marked bad.
    """
    scale = (y.abs().amax(-1) / LEVELS).to(torch.float16)
    bad = ~torch.isfinite(scale)
    scale = scale.masked_fill(bad, 0)
    divisor = scale.float().unsqueeze(-1)
    codes = torch.round(y / divisor).clamp_(-LEVELS, LEVELS)
    return codes.masked_fill_((divisor == 0) | bad.unsqueeze(-1), 0).to(torch.int8), scale, bad


def dequantise_rows(codes: Tensor, scale: Tensor) -> Tensor:
    """(int8 [..., D], fp16 [...]) to float32 [..., D]."""
    return codes.float() * scale.float().unsqueeze(-1)
