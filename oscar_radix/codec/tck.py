"""`tck`: keys in the joint query/key eigenbasis, bits given to channels by reverse water-filling; 2-bit values.

Queries count in that basis by how much errors of keys hurt them (`calibration.damage`): most rest on a sink, and hardly do.

Reverse water-filling: T. M. Cover and J. A. Thomas, "Elements of Information Theory", section 10.3.3, here with the widths and
errors of real uniform quantisers.
"""

import torch
from torch import Tensor

from oscar_radix.codec.allocation import LOW_BITS, best_counts, expected_error, place
from oscar_radix.codec.base import Recipe
from oscar_radix.codec.calibration import Calibration, CalibrationError
from oscar_radix.codec.layout import RecordLayout
from oscar_radix.codec.moments import Moments
from oscar_radix.codec.rotation import joint_basis
from oscar_radix.codec.stepped import SteppedCodec
from oscar_radix.codec.uniform import GAUSSIAN_MSE
from oscar_radix.codec.value_basis import value_basis

QUERY_RIDGE = 1e-2
"""Share of the mean eigenvalue added to the query second moment, so that directions no query used stay invertible.

From 1e-2 to 1e-1 the KL on SmolLM2 does not change beyond its error.
"""
WHITENING = 0.5
"""Channel c of the joint eigenbasis is divided by sigma_c to this power before int8 rows are made, and the query multiplied by it.

int8 rows have one step for all channels. Undivided, the largest channel dictates it (KL of int8 rows alone .0030 on SmolLM2);
divided by sqrt(sigma_c) it is .0003; divided by sigma_c .0004.
"""
KEY_MEAN_SHARE = 0.5
"""The mean that is subtracted from keys stands this far from the mean of all keys towards that of the keys that matter: a row's error
grows with its distance from it. Half way: a few keys may hold all the weight, and the others are read too.
"""
REFINED_SHARE = 1 / 16
"""Of a model's layers, rounded: those whose outputs 2-bit records would change most, relative to their energy, have 4 bits.

For .13 bits on average the KL of the default settings on SmolLM2 falls from .0037 to .0027 (.0067 to .0047 behind 6,144 tokens), which a
second hot row of every page, .26 bits, does not reach; copies rise from .926 to .956, the exact cache's being .962 (benchmarks.quality).
"""
VARIANCE_FLOOR = 1e-8
"""Smallest channel variance, as a share of the row's largest: keeps steps of directions that never varied above zero."""


class TckRecipe(Recipe):
    """refined_share: of a model's layers."""

    name = "tck"

    def __init__(self, refined_share: float = REFINED_SHARE) -> None:
        self.refined_share = refined_share

    def layout(self, head_dim: int) -> RecordLayout:
        return RecordLayout(k_code_bytes=head_dim // 4, v_code_bytes=head_dim // 4, scale_count=2)

    def fit(self, moments: Moments) -> Calibration:
        shift = KEY_MEAN_SHARE * (moments.key_damage_mean - moments.key_mean)
        second = moments.key_covariance + shift.unsqueeze(-1) * shift.unsqueeze(-2)
        basis, inverse_transpose, variances = joint_basis(moments.query_damage_second, second, QUERY_RIDGE)
        variances = torch.maximum(variances, variances[..., :1] * VARIANCE_FLOOR).clamp(min=torch.finfo(torch.float32).tiny)
        dim = moments.geometry.head_dim
        counts = best_counts(variances)
        refined = self._refined(moments, expected_error(counts, variances))
        counts[refined] = best_counts(variances[refined], LOW_BITS)
        placed = [place(each, dim) for each in counts.flatten(0, 1).tolist()]
        order, widths = (torch.stack(parts).view(*variances.shape) for parts in zip(*placed, strict=True))
        columns = order.unsqueeze(-2).expand_as(basis)
        sigma = variances.gather(-1, order).sqrt()
        gain = sigma.pow(-WHITENING).unsqueeze(-2)
        tensors = {
            "key_basis": (basis.gather(-1, columns) * gain).float(),
            "query_basis": (inverse_transpose.gather(-1, columns) / gain).float(),
            "key_mean": (moments.key_mean + shift).float(),
            **value_basis(moments),
            "key_widths": widths.to(torch.uint8),
            "key_sigma": sigma.pow(1 - WHITENING).float(),
            "refined": torch.zeros(widths.shape[:2], dtype=torch.uint8).index_fill(0, refined, 1),
        }
        return Calibration(self.name, moments.geometry, tensors, moments.tokens)

    def refined_layers(self, layers: int) -> int:
        return round(layers * self.refined_share)

    def _refined(self, moments: Moments, key_error: Tensor) -> Tensor:
        """The layers to refine, int64: largest expected error of outputs read from 2-bit records, over the energy of outputs.

        key_error: float64 [L, H], expected square of a logit's error before the softmax scale.
        """
        error = (moments.logit_damage * key_error + moments.value_damage * GAUSSIAN_MSE[2]).sum(1)
        relative = error / moments.output_energy.sum(1).clamp(min=1e-300)
        return relative.topk(self.refined_layers(moments.geometry.layers)).indices.sort().values

    def codec(self, calibration: Calibration, device: torch.device | str) -> SteppedCodec:
        self._check(calibration)
        codec = SteppedCodec(calibration, device, self.layout(calibration.geometry.head_dim))
        layers = calibration.geometry.layers
        refined, wanted = len(codec.refined), self.refined_layers(layers)
        if refined != wanted:
            raise CalibrationError(f"this calibration refines {refined} of {layers} layers, recipe 'tck' {wanted}: calibrate again")
        return codec
