"""Attention of a few queries over one set of keys, with the log-sum-exp that lets partial results merge."""

import torch


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax(scale * q k^T) v in float32, for one sequence.

    Args:
        query: float32 [Tq, Hq, D]; Hq is a multiple of Hkv, query head h reads KV head h // (Hq / Hkv).
        key, value: float32 [Hkv, Tk, D].
        scale: multiplies the scores.
        mask: bool, True where a key may be read; [Tq, Tk] (causal), or [Hkv, 1, Tk] (rows of a head). None reads all.

    Returns:
        out float32 [Tq, Hq, D] and lse float32 [Tq, Hq], natural logarithm; a query without keys gives (0, -inf).
    """
    tokens, query_heads, dim = query.shape
    kv_heads, keys, _ = key.shape
    if keys == 0:
        return query.new_zeros(tokens, query_heads, dim), query.new_full((tokens, query_heads), float("-inf"))
    group = query_heads // kv_heads
    # [Hkv, G * Tq, D]: the queries of a GQA group share one pass over their keys.
    rows = query.view(tokens, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * tokens, dim)
    scores = torch.bmm(rows * scale, key.transpose(1, 2)).view(kv_heads, group, tokens, keys)
    if mask is not None:
        shape = (1, 1, tokens, keys) if mask.dim() == 2 else (kv_heads, 1, 1, keys)
        scores = scores.masked_fill(~mask.view(shape), float("-inf"))
    top = scores.amax(dim=-1, keepdim=True)
    top = torch.where(torch.isneginf(top), torch.zeros_like(top), top)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    out = torch.bmm(weights.view(kv_heads, group * tokens, keys), value).view(kv_heads, group, tokens, dim)
    out = out / torch.where(total > 0, total, torch.ones_like(total))
    lse = (top + torch.log(total)).squeeze(-1)
    return out.permute(2, 0, 1, 3).reshape(tokens, query_heads, dim), lse.permute(2, 0, 1).reshape(tokens, query_heads)
