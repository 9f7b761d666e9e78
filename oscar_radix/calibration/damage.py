"""How much the errors of quantised keys hurt a query: the weight with which it counts in the metric of K."""

import torch
from torch import Tensor

SINKS = 64
NEAREST = 64
"""Keys that count stand behind the sinks and at least this far before the query: those between are int8 when they are read."""
BLOCK = 256
"""Queries at a time, so that a block's probabilities stay in a CPU's cache."""


def key_damage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[G, T]: sum_i p_i**2 |v_i - o|**2 over the keys i that count, for each query of one sequence and one KV head.

    If the logit of key i is off by a small e_i, the output o = sum p_i v_i moves by sum_i p_i e_i (v_i - o). For independent errors
    of variance q C q^T, C the covariance of a key's error, the expected square of that is the weight times q C q^T: so the mean of
    weight * q^T q is the metric in which keys are to be exact. Queries that rest on a sink, most of them, hardly count.

    Args:
        q: [G, T, D], the queries of a GQA group. k, v: [T, D]. All float32, finite.
        scale: of the scores.
    """
    tokens = k.shape[0]
    place = torch.arange(tokens, device=k.device)
    # |v - o|**2 = |v|**2 - 2 v.o + |o|**2: one product gives the three sums.
    sums = torch.cat((v, v.square().sum(-1, keepdim=True), torch.ones_like(v[:, :1])), 1)
    weights = torch.zeros(q.shape[:2], device=q.device)
    for first in range(SINKS + NEAREST, tokens, BLOCK):
        own = place[first : first + BLOCK]
        last = int(own[-1]) + 1
        scores = (q[:, own] @ k[:last].T).mul_(scale).masked_fill_(place[:last] > own[:, None], -torch.inf)
        p = scores.softmax(-1)
        out = p @ v[:last]
        p.square_()[..., :SINKS] = 0
        p.masked_fill_(place[:last] > own[:, None] - NEAREST, 0)
        along, squares, total = (p @ sums[:last]).split((v.shape[-1], 1, 1), -1)
        weight = squares - 2 * (along * out).sum(-1, keepdim=True) + total * out.square().sum(-1, keepdim=True)
        weights[:, own] = weight.squeeze(-1).clamp_(min=0)
    return weights
