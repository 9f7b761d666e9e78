"""The published 2-bit quantiser: clip the row's largest magnitudes, then min/max over the row (asymmetric)."""

import torch
from torch import Tensor

CODE_MAX = 3


def clip_index(ratio: float, head_dim: int) -> int:
    """Rank, in ascending |x|, of the magnitude that a row is clipped to."""
    return min(int(ratio * head_dim), head_dim - 1)


def quantise(x: Tensor, clip_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
    """float32 rows [..., D] to (uint8 codes 0..3 [..., D], fp16 scale [...], fp16 zero [...]); clip_ratio 0 does not clip.

    scale = (max - min)/3, zero = -min/scale (not rounded to an integer), code = floor(x/scale + zero + 1/2). The codes use
    the fp16 values of scale and zero, which are what a reader has.
    """
    if clip_ratio:
        beyond = x.shape[-1] - clip_index(clip_ratio, x.shape[-1])
        threshold = x.abs().topk(beyond, dim=-1).values[..., -1:]
        x = torch.maximum(torch.minimum(x, threshold), -threshold)
    low, high = x.amin(-1), x.amax(-1)
    scale = ((high - low).clamp(min=1e-8) / CODE_MAX).to(torch.float16)
    # A constant row is below fp16's smallest number: it has no spread to code, and its scale 0 reads back as zeros.
    safe = torch.where(scale > 0, scale.float(), torch.inf)
    zero = (-low / safe).clamp_(-65504.0, 65504.0).to(torch.float16)
    codes = torch.floor(x / safe.unsqueeze(-1) + zero.float().unsqueeze(-1) + 0.5).clamp_(0, CODE_MAX)
    return codes.to(torch.uint8), scale, zero


def dequantise_(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Turn float32 codes [..., D] into (code - zero) * scale, in place."""
    return codes.sub_(zero.float().unsqueeze(-1)).mul_(scale.float().unsqueeze(-1))
