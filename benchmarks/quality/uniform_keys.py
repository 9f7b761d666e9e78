"""K at any average number of bits in the `tck` basis: the control that spends spare bits on every token alike. Emulated, not packed."""

import torch
from torch import Tensor

from oscar_radix.codec.calibration import Calibration
from oscar_radix.codec.tck import WHITENING
from oscar_radix.codec.uniform import GAUSSIAN_MSE, GAUSSIAN_STEP

WIDEST = 6
"""Bits of a channel at most, as in records."""
STRETCHES = (0.8, 1.0, 1.25, 1.6, 2.0, 2.6, 3.4)
"""Row scales that are tried. Records use 1.15 for every row, which clips the large coordinates of the very rows that attention rests on."""


def water_filled(variances: Tensor, bits: float) -> Tensor:
    """Widths int64 [..., D] of 0 to 6 bits, `bits` on average, any mix: each next bit goes where it removes most error."""
    gains = torch.stack([variances * (GAUSSIAN_MSE[width] - GAUSSIAN_MSE[width + 1]) for width in range(WIDEST)], -1)
    count = round(bits * variances.shape[-1])
    order = gains.flatten(-2).argsort(-1, descending=True)[..., :count]
    return torch.zeros_like(gains.flatten(-2)).scatter_(-1, order, 1.0).unflatten(-1, gains.shape[-2:]).sum(-1).long()


class UniformKeys:
    """K of a `tck` calibration at `bits` bits a channel on average, in every layer and head; one fp16 scale a row, as its records have.

    At 2 bits the widths are the records' own: records in their own format, with the row scale searched.
    """

    def __init__(self, calibration: Calibration, bits: float, device: torch.device | str = "cpu") -> None:
        if calibration.recipe != "tck":
            raise ValueError(f"widths by need are for recipe 'tck', not '{calibration.recipe}'")
        sigma = calibration.tensors["key_sigma"].double()
        widths = calibration.tensors["key_widths"].long().cpu() if bits == 2 else water_filled(sigma.pow(2 / (1 - WHITENING)), bits)
        step = torch.tensor([GAUSSIAN_STEP[width] for width in range(WIDEST + 1)], dtype=torch.float64)[widths] * sigma
        self.coded, self.sigma, self.step = (widths > 0).to(device), sigma.float().to(device), step.float().to(device)
        self.top = (2.0**widths - 1).float().to(device)

    def through(self, layer: int, y: Tensor) -> Tensor:
        """Rows [P, H, D] in the basis, coded and read back. The row scale is the best of STRETCHES times the root mean square, by
        squared error in the query metric, in which channel c of the basis weighs sigma_c**2."""
        coded, sigma, step, top = self.coded[layer], self.sigma[layer], self.step[layer], self.top[layer]
        size = (((y / sigma).square() * coded).sum(-1, keepdim=True) / coded.sum(-1, keepdim=True)).sqrt()
        best, least = torch.zeros_like(y), torch.full_like(size, torch.inf)
        for stretch in STRETCHES:
            row = (size * stretch).half().float()
            code = torch.floor(y / (row * step).clamp(min=1e-12) + (top + 1) / 2)
            read = (torch.minimum(code.clamp(min=0), top) - top / 2) * step * row * coded
            error = ((read - y).square() * sigma.square()).sum(-1, keepdim=True)
            best, least = torch.where(error < least, read, best), torch.minimum(error, least)
        return best
