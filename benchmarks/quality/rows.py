"""A prefix's rows at every precision, in a codec's basis: what a cell of the grid mixes."""

import torch
from torch import Tensor

from benchmarks.quality.uniform_keys import UniformKeys
from oscar_radix.codec import Calibration, Codec, dequantise_rows, quantise_rows

INT4_LEVELS = 7
INT4_CLIPS = (1.0, 0.85, 0.7, 0.55)
"""Shares of the largest magnitude that an int4 row may be clipped to."""

Layers = list[tuple[Tensor, Tensor]]
"""K and V [P, H, D] of every layer, float32, in the basis."""


def int4_rows(y: Tensor) -> Tensor:
    """Rows [..., D] through int4 and back: one fp16 step a row, the clip of INT4_CLIPS with the least squared error."""
    largest = y.abs().amax(-1, keepdim=True)
    best, least = torch.zeros_like(y), torch.full_like(largest, torch.inf)
    for clip in INT4_CLIPS:
        step = (largest * clip / INT4_LEVELS).half().float()
        read = torch.round(y / step.clamp(min=1e-8)).clamp(-INT4_LEVELS, INT4_LEVELS) * step
        error = (read - y).square().sum(-1, keepdim=True)
        best, least = torch.where(error < least, read, best), torch.minimum(error, least)
    return best


class PrefixRows:
    """One prefix under one codec: `hot` int8 rows, `cold` 2-bit records sealed from them, and emulated formats on request.

    Args:
        codec: a recipe bound to `calibration`.
        keys, values: exact post-RoPE K and V per layer [P, H, D], P a multiple of 32.
    """

    def __init__(self, codec: Codec, calibration: Calibration, keys: list[Tensor], values: list[Tensor]) -> None:
        self.codec, self.calibration = codec, calibration
        self.hot: Layers = []
        self.cold: Layers = []
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            k8, k_scale, _ = quantise_rows(codec.keys_to_basis(layer, k))
            v8, v_scale, _ = quantise_rows(codec.values_to_basis(layer, v))
            page = [x.transpose(0, 1).unsqueeze(0) for x in (k8, k_scale, v8, v_scale)]
            self.cold.append(tuple(x[0].transpose(0, 1) for x in codec.open(layer, *codec.seal(layer, *page))))
            self.hot.append((dequantise_rows(k8, k_scale), dequantise_rows(v8, v_scale)))
        self._made: dict[str, Layers] = {"int8": self.hot}

    def format(self, name: str) -> Layers:
        """Rows of a format, made once: `int8`; `int4`: 4 bits on average, K's channels of `tck` by need; `plain4`: 4 bits everywhere."""
        if name not in self._made:
            if name == "plain4" or (name == "int4" and self.calibration.recipe != "tck"):
                self._made[name] = [(int4_rows(k), int4_rows(v)) for k, v in self.hot]
            elif name == "int4":
                keys = UniformKeys(self.calibration, 4.0, self.codec.device)
                self._made[name] = [(keys.through(layer, k), int4_rows(v)) for layer, (k, v) in enumerate(self.hot)]
            else:
                raise ValueError(f"there is no row format '{name}'")
        return self._made[name]

    def records(self, key_bits: float | None) -> Layers:
        """Cold rows: the codec's own records, or with K at `key_bits` bits on average and the codec's V."""
        if key_bits is None:
            return self.cold
        name = f"K{key_bits}"
        if name not in self._made:
            keys = UniformKeys(self.calibration, key_bits, self.codec.device)
            self._made[name] = [(keys.through(layer, k), self.cold[layer][1]) for layer, (k, _) in enumerate(self.hot)]
        return self._made[name]

    def mixed(
        self, layer: int, whole: Tensor, chosen: Tensor, row_format: str = "int8", key_bits: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """K and V of one layer as a reader finds them.

        Args:
            whole: bool [P], tokens at int8 in every layer and head: sinks and recent window.
            chosen: bool [H, P], tokens with a hot row of `row_format`.
        """
        parts = zip(self.hot[layer], self.format(row_format)[layer], self.records(key_bits)[layer], strict=True)
        chosen, whole = chosen.T.unsqueeze(-1), whole[:, None, None]
        return tuple(torch.where(whole, hot, torch.where(chosen, row, record)) for hot, row, record in parts)
