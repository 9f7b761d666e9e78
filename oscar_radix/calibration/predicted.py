"""What error a fitted recipe will make, predicted from the moments it was fitted on."""

from dataclasses import replace

import torch
from torch import Tensor

from oscar_radix.codec import Calibration, Codec, Moments, Recipe, quantise_rows

SAMPLES = 256
"""Rows drawn per (layer, KV head): the relative error is known to about 2 %."""


def fit(recipe: Recipe, moments: Moments) -> Calibration:
    """`recipe.fit`, with the predicted errors and the skipped rows put into the report."""
    calibration = recipe.fit(moments)
    key_error, value_error = predicted_errors(recipe.codec(calibration, "cpu"), moments)
    report = {"key_error": key_error, "value_error": value_error, "skipped_rows": moments.skipped_rows}
    return replace(calibration, report={**calibration.report, **report})


def predicted_errors(codec: Codec, moments: Moments) -> tuple[list[float], list[float]]:
    """Per layer, averaged over heads: relative error of 2-bit K in the query metric, and of 2-bit V.

    Gaussian rows with the moments' means and covariances pass through int8 rows, `seal` and `open`. K: error energy e C_Q e^T
    over the energy of the centred keys in the same metric, C_Q the second moment of queries weighted by `damage.key_damage`. V: error
    energy over that of the centred values, under the attention-weighted covariance.
    """
    draw = torch.Generator().manual_seed(0)
    keys = _sample(moments.key_mean, moments.key_covariance, draw)
    values = _sample(moments.value_mean, moments.value_weighted_covariance, draw)
    # In the basis a query second moment C becomes B^T C B, B = A^-T.
    query_basis = codec.query_basis.double().cpu()
    metric = query_basis.mT @ moments.query_damage_second @ query_basis
    key_errors, value_errors = [], []
    for layer in range(moments.geometry.layers):
        k_rows = codec.keys_to_basis(layer, keys[layer].to(codec.device)).transpose(0, 1).unsqueeze(0).contiguous()
        v_rows = codec.values_to_basis(layer, values[layer].to(codec.device)).transpose(0, 1).unsqueeze(0).contiguous()
        (k8, k_scale, _), (v8, v_scale, _) = quantise_rows(k_rows), quantise_rows(v_rows)
        k_open, v_open = codec.open(layer, *codec.seal(layer, k8, k_scale, v8, v_scale))
        k_error, k_row = ((x[0].double().cpu()) for x in (k_open - k_rows, k_rows - k_rows.mean(2, keepdim=True)))
        v_error, v_row = ((x[0].double().cpu()) for x in (v_open - v_rows, v_rows - v_rows.mean(2, keepdim=True)))
        key_errors.append(float((_energy(k_error, metric[layer]) / _energy(k_row, metric[layer])).mean()))
        value_errors.append(float((v_error.square().sum((1, 2)) / v_row.square().sum((1, 2))).mean()))
    return key_errors, value_errors


def _sample(mean: Tensor, covariance: Tensor, draw: torch.Generator) -> Tensor:
    """Gaussian rows [L, SAMPLES, H, D] with a mean [L, H, D] and covariance [L, H, D, D]."""
    values, vectors = torch.linalg.eigh((covariance + covariance.mT) / 2)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    normal = torch.randn(*mean.shape[:2], SAMPLES, mean.shape[-1], generator=draw, dtype=torch.float64)
    return (normal @ root.mT + mean.unsqueeze(2)).transpose(1, 2)


def _energy(rows: Tensor, metric: Tensor) -> Tensor:
    """[H]: sum over rows [H, N, D] of x M x^T, metric [H, D, D]."""
    return ((rows @ metric) * rows).sum((1, 2))
