"""`oscar`: the published method, for comparison (arXiv 2605.17757, per-KV-head rotations).

Orthonormal rotations from the query covariance (K) and the score-weighted value covariance (V), rows clipped at .96 (K) and
.92 (V) of their sorted magnitudes, min/max 2 bits with scale and zero; no mean is subtracted.
"""

import torch
from torch import Tensor

from oscar_radix.codec import affine
from oscar_radix.codec.base import Codec, Recipe
from oscar_radix.codec.calibration import Calibration
from oscar_radix.codec.int8_rows import dequantise_rows
from oscar_radix.codec.layout import RecordLayout
from oscar_radix.codec.moments import Moments
from oscar_radix.codec.packing import KeyPacking, pack_values, unpack_values_into
from oscar_radix.codec.rotation import oscar_rotation

KEY_CLIP = 0.96
VALUE_CLIP = 0.92


class OscarCodec(Codec):
    """Scales of a record: K scale, K zero, V scale, V zero."""

    def __init__(self, calibration: Calibration, device: torch.device | str, layout: RecordLayout) -> None:
        super().__init__(calibration, device)
        self.layout = layout
        self._packing = KeyPacking(torch.full((self.geometry.head_dim,), 2, device=self.device))

    def seal(self, layer: int, k_rows: Tensor, k_scale: Tensor, v_rows: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k_codes, *k_affine = affine.quantise(dequantise_rows(k_rows, k_scale), KEY_CLIP)
        v_codes, *v_affine = affine.quantise(dequantise_rows(v_rows, v_scale), VALUE_CLIP)
        return self._packing.pack(k_codes), pack_values(v_codes), torch.stack((*k_affine, *v_affine), -1)

    def open(self, layer: int, k_codes: Tensor, v_codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        k = torch.empty(*k_codes.shape[:-1], self.geometry.head_dim, device=k_codes.device)
        v = torch.empty_like(k)
        self._packing.operands_into(k_codes, k)
        unpack_values_into(v_codes, v)
        return affine.dequantise_(k, scales[..., 0], scales[..., 1]), affine.dequantise_(v, scales[..., 2], scales[..., 3])


class OscarRecipe(Recipe):
    name = "oscar"

    def layout(self, head_dim: int) -> RecordLayout:
        return RecordLayout(k_code_bytes=head_dim // 4, v_code_bytes=head_dim // 4, scale_count=4)

    def fit(self, moments: Moments) -> Calibration:
        rotation = oscar_rotation(moments.query_second).float()
        tensors = {
            "key_basis": rotation,
            "query_basis": rotation.clone(),
            "key_mean": torch.zeros_like(moments.key_mean, dtype=torch.float32),
            "value_mean": torch.zeros_like(moments.value_mean, dtype=torch.float32),
            "value_rotation": oscar_rotation(moments.value_weighted_second).float(),
        }
        return Calibration(self.name, moments.geometry, tensors, moments.tokens)

    def codec(self, calibration: Calibration, device: torch.device | str) -> OscarCodec:
        self._check(calibration)
        return OscarCodec(calibration, device, self.layout(calibration.geometry.head_dim))
