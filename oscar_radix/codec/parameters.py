"""A codec before its calibration exists: its bytes, and a placeholder at its addresses."""

from dataclasses import replace

import torch

from oscar_radix.codec.base import Codec, Recipe
from oscar_radix.codec.moments import Moments
from oscar_radix.geometry import Geometry


def placeholder(recipe: Recipe, geometry: Geometry, device: torch.device | str) -> Codec:
    """A codec fitted on white moments; `Codec.assign` gives it a calibration's parameters later."""
    return recipe.codec(recipe.fit(_white(geometry)), device)


def parameter_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of all parameter tensors that `recipe` will hold for `geometry`; they do not depend on the calibration's values."""
    # Not one layer's bytes times the layers: some parameters are shared by all layers.
    one, two = (placeholder(recipe, replace(geometry, layers=layers), "cpu").parameter_bytes for layers in (1, 2))
    return one + (geometry.layers - 1) * (two - one)


def _white(geometry: Geometry) -> Moments:
    heads, dim = geometry.kv_heads, geometry.head_dim
    white = torch.eye(dim, dtype=torch.float64).expand(geometry.layers, heads, dim, dim).contiguous()
    zero = torch.zeros(geometry.layers, heads, dim, dtype=torch.float64)
    one = torch.ones(geometry.layers, heads, dtype=torch.float64)
    return Moments(
        geometry=geometry,
        tokens=dim,
        skipped_rows=0,
        logit_damage=one,
        value_damage=one,
        output_energy=one,
        key_mean=zero,
        key_damage_mean=zero,
        key_second=white,
        query_second=white,
        query_damage_second=white,
        value_mean=zero,
        value_weighted_mean=zero,
        value_weighted_second=white,
    )
