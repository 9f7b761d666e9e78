"""How much attention a few queries gave to each key, in plain torch."""

import torch


def attention_mass(query: torch.Tensor, lse: torch.Tensor, key: torch.Tensor, limits: torch.Tensor, scale: float) -> torch.Tensor:
    """Sum over the queries and the heads of a GQA group of exp(scale * q k - lse), each at most 1.

    Args:
        query: float32 [T, Hq, D]; query head h reads KV head h // (Hq / Hkv).
        lse: float32 [T, Hq], natural logarithm of the sum of exp(score) over all keys of the query; a query head whose lse is not
            finite counts nothing.
        key: float32 [Hkv, K, D].
        limits: int [T]; query t gives mass to keys 0 .. limits[t] - 1.
        scale: multiplies the scores.

    Returns:
        float32 [Hkv, K].
    """
    tokens, _, dim = query.shape
    kv_heads, keys, _ = key.shape
    rows = query.view(tokens, kv_heads, -1, dim).permute(1, 0, 2, 3)  # [Hkv, T, G, D]
    scores = torch.einsum("htgd,hkd->htgk", rows * scale, key)
    reference = lse.view(tokens, kv_heads, -1).permute(1, 0, 2)[..., None]
    counted = reference.isfinite() & (torch.arange(keys, device=key.device) < limits.view(1, tokens, 1, 1))
    weights = torch.exp(scores - reference).clamp(max=1.0)
    return weights.masked_fill(~counted, 0.0).sum(dim=(1, 2))
