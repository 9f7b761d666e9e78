"""Bytes of a codec's parameters, known before its calibration exists."""

from dataclasses import replace

import torch

from oscar_radix.codec.base import Recipe
from oscar_radix.codec.moments import Moments
from oscar_radix.geometry import Geometry


def parameter_bytes(recipe: Recipe, geometry: Geometry) -> int:
    """Bytes of all parameter tensors that `recipe` will hold for `geometry`.

    They do not depend on the calibration's values, so one layer is fitted on white moments and counted.
    """
    one_layer = replace(geometry, layers=1)
    heads, dim = geometry.kv_heads, geometry.head_dim
    white = torch.eye(dim, dtype=torch.float64).expand(1, heads, dim, dim).contiguous()
    zero = torch.zeros(1, heads, dim, dtype=torch.float64)
    moments = Moments(
        geometry=one_layer,
        tokens=dim,
        skipped_rows=0,
        key_mean=zero,
        key_second=white,
        query_second=white,
        value_mean=zero,
        value_weighted_mean=zero,
        value_weighted_second=white,
    )
    return recipe.codec(recipe.fit(moments), "cpu").parameter_bytes * geometry.layers
