"""`mulm`: OSCAR's rotations, with the mean of K subtracted and uniform 4-level steps."""

import torch

from oscar_radix.codec.base import Recipe
from oscar_radix.codec.calibration import Calibration
from oscar_radix.codec.layout import RecordLayout
from oscar_radix.codec.moments import Moments
from oscar_radix.codec.rotation import oscar_rotation
from oscar_radix.codec.stepped import SteppedCodec
from oscar_radix.codec.value_basis import value_basis


class MulmRecipe(Recipe):
    name = "mulm"

    def layout(self, head_dim: int) -> RecordLayout:
        return RecordLayout(k_code_bytes=head_dim // 4, v_code_bytes=head_dim // 4, scale_count=2)

    def fit(self, moments: Moments) -> Calibration:
        rotation = oscar_rotation(moments.query_second).float()
        shape = moments.key_mean.shape
        tensors = {
            "key_basis": rotation,
            "query_basis": rotation.clone(),
            "key_mean": moments.key_mean.float(),
            **value_basis(moments),
            "key_widths": torch.full(shape, 2, dtype=torch.uint8),
            "key_sigma": torch.ones(shape),
        }
        return Calibration(self.name, moments.geometry, tensors, moments.tokens)

    def codec(self, calibration: Calibration, device: torch.device | str) -> SteppedCodec:
        self._check(calibration)
        return SteppedCodec(calibration, device, self.layout(calibration.geometry.head_dim))
