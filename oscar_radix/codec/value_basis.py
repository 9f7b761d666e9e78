"""The value basis of `mulm` and `tck`: which mean to subtract, and the rotation."""

import torch
from torch import Tensor

from oscar_radix.codec.moments import Moments
from oscar_radix.codec.rotation import oscar_rotation

MEAN_SHARE = 0.5
"""The mean of V is subtracted where it holds more than this share of the energy of V, as a bias of the value projection makes it.

Elsewhere subtracting it makes things worse (KL of 2-bit V alone on SmolLM2 .0091 against .0032): attention rests on tokens whose
values are near zero, a row's error is proportional to its norm, and a subtracted mean puts such rows far from the origin.
"""


def value_basis(moments: Moments) -> dict[str, Tensor]:
    """`value_mean` [L, H, D] and orthonormal `value_rotation` [L, H, D, D], float32."""
    mean, weighted = moments.value_mean, moments.value_weighted_mean
    energy = torch.diagonal(moments.value_weighted_second, dim1=-2, dim2=-1).sum(-1, keepdim=True)
    subtract = weighted.square().sum(-1, keepdim=True) > MEAN_SHARE * energy
    second = torch.where(subtract.unsqueeze(-1), moments.value_weighted_covariance, moments.value_weighted_second)
    return {"value_mean": torch.where(subtract, mean, 0.0).float(), "value_rotation": oscar_rotation(second).float()}
