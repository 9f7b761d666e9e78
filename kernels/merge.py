"""Merge two partial attention results by their log-sum-exp."""

import torch


def merge_states(out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint key sets, from the attention over each.

    softmax over A and B splits as o = (e^la * oa + e^lb * ob) / (e^la + e^lb) with la, lb the log-sum-exp of the scores
    (FlashAttention-2, arXiv 2307.08691, section 2.3). An empty set is (anything finite, -inf); two empty sets give (0, -inf).

    Args:
        out_a, out_b: float32 [..., D], each normalised over its own keys.
        lse_a, lse_b: float32 [...], natural logarithm.

    Returns:
        (out [..., D], lse [...]) over both sets.
    """
    top = torch.maximum(lse_a, lse_b)
    finite_top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    weight_a = torch.exp(lse_a - finite_top)
    weight_b = torch.exp(lse_b - finite_top)
    total = weight_a + weight_b
    safe = torch.where(total > 0, total, torch.ones_like(total))
    out = (out_a * weight_a[..., None] + out_b * weight_b[..., None]) / safe[..., None]
    return out, finite_top + torch.log(total)
