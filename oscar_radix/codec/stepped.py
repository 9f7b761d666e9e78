"""The codec of `mulm` and `tck`: static channel steps, one fp16 scale per row for K and one for V."""

import torch
from torch import Tensor

from oscar_radix.codec import uniform
from oscar_radix.codec.allocation import LOW_BITS, is_readable
from oscar_radix.codec.base import Codec
from oscar_radix.codec.calibration import Calibration, CalibrationError
from oscar_radix.codec.layout import RecordLayout
from oscar_radix.codec.packing import KeyPacking, pack_values, unpack_values, unpack_values_into

LOW_LEVELS = 2**LOW_BITS
"""A refined layer's codes are LOW_LEVELS * (the record's) + the low ones."""
VALUE_TOP = 3
"""Largest 2-bit code."""
FINE_VALUE_TOP = LOW_LEVELS * (VALUE_TOP + 1) - 1
"""Largest code of V in a refined layer."""


class SteppedCodec(Codec):
    """K: widths and steps per (layer, KV head, channel); level = (operand - key_zero) * key_step * scale. V: 2 bits everywhere. In a
    refined layer every channel of both has LOW_BITS more, and the operand is the code.

    The K scale is the row's root mean square over its coded channels, each divided by its calibrated deviation, times
    `uniform.ROW_STRETCH`; V is coded in a step made likewise, and its scale is the step at which it is read without bias
    (`uniform.unbiased_scale`). Scales of a record: K, V.
    key_step, key_zero: float32 [L, H, D], of operands; key_masks: uint8 [L, H, 4, D/4] (`packing`). A kernel folds key_step into
    the query. low_places: int32 [L], which of the refined layers this one is, -1: none.
    """

    def __init__(self, calibration: Calibration, device: torch.device | str, layout: RecordLayout) -> None:
        super().__init__(calibration, device)
        self.layout = layout
        missing = {"key_widths", "key_sigma"} - calibration.tensors.keys()
        if missing:
            raise CalibrationError(f"the calibration of recipe '{calibration.recipe}' lacks the tensors {sorted(missing)}")
        widths, sigma = calibration.tensors["key_widths"].long().cpu(), calibration.tensors["key_sigma"].double().cpu()
        packing = KeyPacking(widths)
        if not is_readable(packing.masks):
            raise CalibrationError("this calibration gives channels other widths than kernels can read at their places: calibrate again")
        refined = calibration.tensors.get("refined", torch.zeros(widths.shape[:2])).bool().any(1)
        if bool(packing.lifts[refined].any()):
            raise CalibrationError("this calibration gives channels of refined layers widths that kernels cannot read: calibrate again")
        self.refined = tuple(refined.nonzero().flatten().tolist())
        self.low_places = self._keep("low_places", torch.where(refined, refined.cumsum(0) - 1, -1).to(torch.int32))
        self.key_masks = self._keep("key_masks", packing.masks)
        lifts = self._keep("key_lifts", packing.lifts)
        self._packing = [KeyPacking.of(masks.unsqueeze(1), layer.unsqueeze(1)) for masks, layer in zip(self.key_masks, lifts, strict=True)]
        self._even = KeyPacking.even(self.geometry.head_dim, device)
        widths = widths + LOW_BITS * refined[:, None, None]
        gaussian = torch.tensor([uniform.GAUSSIAN_STEP[w] for w in sorted(uniform.GAUSSIAN_STEP)], dtype=torch.float64)[widths]
        top = 2.0**widths - 1
        lift = 2.0 ** packing.lifts.flatten(-2).double()
        self.key_top = self._keep("key_top", top.float())
        self._inverse_step = self._keep("key_inverse_step", 1.0 / (gaussian * sigma).float())
        self.key_step = self._keep("key_step", (gaussian * sigma / lift).float())
        self.key_zero = self._keep("key_zero", (top / 2 * lift).float())
        coded = widths > 0
        weights = uniform.energy_weights(sigma.square(), coded)
        self._energy_weights = self._keep("energy_weights", weights)
        share = (1.0 / sigma.square()).masked_fill(~coded, 0).amax(-1) / (uniform.ENERGY_WEIGHT_MAX * coded.sum(-1))
        self._energy_unit = self._keep("energy_unit", share * uniform.ROW_STRETCH**2)
        head_dim = self.geometry.head_dim
        self._value_weights = self._keep("value_weights", torch.ones(head_dim, dtype=torch.float64))
        steps = (uniform.GAUSSIAN_STEP[2] * uniform.ROW_STRETCH, uniform.GAUSSIAN_STEP[2 + LOW_BITS] * LOW_LEVELS)
        units = [torch.tensor(step**2 / head_dim, dtype=torch.float64) for step in steps]
        self._value_units = tuple(self._keep(f"value_unit_{index}", unit) for index, unit in enumerate(units))
        self._ones = self._keep("ones", torch.ones(head_dim))

    def seal(self, layer: int, k_rows: Tensor, k_scale: Tensor, v_rows: Tensor, v_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        refined = layer in self.refined
        weights, unit = self._energy_weights[layer].unsqueeze(1), self._energy_unit[layer].unsqueeze(1)
        k_row = uniform.row_scale(k_rows, k_scale, weights, unit)
        k_codes = uniform.encode(k_rows, k_scale, k_row, self._inverse_step[layer].unsqueeze(1), self.key_top[layer].unsqueeze(1))
        v_row = uniform.row_scale(v_rows, v_scale, self._value_weights, self._value_units[refined])
        levels, top = (LOW_LEVELS, FINE_VALUE_TOP) if refined else (1, VALUE_TOP)
        v_codes = uniform.encode(v_rows, v_scale, v_row, self._ones * levels, self._ones * top)
        scales = torch.stack((k_row, uniform.unbiased_scale(v_rows, v_scale, v_codes, top)), -1)
        if not refined:
            return self._packing[layer].pack(k_codes), pack_values(v_codes), scales
        k = (self._packing[layer].pack(k_codes >> LOW_BITS), self._even.pack(k_codes % LOW_LEVELS))
        v = (pack_values(v_codes >> LOW_BITS), pack_values(v_codes % LOW_LEVELS))
        return torch.cat(k, -1), torch.cat(v, -1), scales

    def open(self, layer: int, k_codes: Tensor, v_codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        refined = layer in self.refined
        k_high, v_high = (codes[..., : self.geometry.head_dim // 4] for codes in (k_codes, v_codes))
        k = torch.empty(*k_codes.shape[:-1], self.geometry.head_dim, device=k_codes.device)
        v = torch.empty_like(k)
        self._packing[layer].operands_into(k_high, k)
        unpack_values_into(v_high, v)
        value_step, value_zero = self._ones, self._ones * (VALUE_TOP / 2)
        if refined:
            k_low, v_low = (codes[..., self.geometry.head_dim // 4 :] for codes in (k_codes, v_codes))
            k.mul_(LOW_LEVELS).add_(self._even.unpack(k_low))
            v.mul_(LOW_LEVELS).add_(unpack_values(v_low))
            value_step, value_zero = self._ones / LOW_LEVELS, self._ones * (FINE_VALUE_TOP / 2)
        uniform.decode_(k, scales[..., 0], self.key_step[layer].unsqueeze(1), self.key_zero[layer].unsqueeze(1))
        return k, uniform.decode_(v, scales[..., 1], value_step, value_zero)

    # What kernels take, of one layer. Contiguous tensors of the shapes that `oscar_radix.kernels` documents.

    def basis_parameters(self, layer: int) -> tuple[Tensor, ...]:
        """key_mean [H, D], key_basis, query_basis [H, D, D], value_mean [H, D], value_rotation [H, D, D], float32."""
        names = (self.key_mean, self.key_basis, self.query_basis, self.value_mean, self.value_rotation)
        return tuple(tensor[layer] for tensor in names)

    def key_parameters(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """key_step, key_zero float32 [H, D]; key_masks uint8 [H, 4, D/4]."""
        return self.key_step[layer], self.key_zero[layer], self.key_masks[layer]

    def value_parameters(self, layer: int) -> tuple[Tensor, Tensor]:
        """value_rotation float32 [H, D, D], value_mean float32 [H, D]."""
        return self.value_rotation[layer], self.value_mean[layer]

    def seal_parameters(self, layer: int) -> tuple[Tensor, ...]:
        """energy_weights float64 [H, D], energy_unit float64 [H], inverse_step, top float32 [H, D], masks, value_unit float64 []."""
        names = (self._energy_weights, self._energy_unit, self._inverse_step, self.key_top, self.key_masks)
        return (*(tensor[layer] for tensor in names), self._value_units[layer in self.refined])
