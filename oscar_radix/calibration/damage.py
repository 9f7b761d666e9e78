"""How much the errors of quantised keys hurt: the weight with which a query counts in the metric of K, and a key in its mean."""

import torch
from torch import Tensor

SINKS = 64
NEAREST = 64
"""Keys that count stand behind the sinks and at least this far before the query; the nearest are int8 when they are read. A whole recent
window would leave few keys to count in a sequence of 1,024 tokens.
"""
BLOCK = 256
"""Queries at a time, so that a block's probabilities stay in a CPU's cache."""


def key_damage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """p_i**2 |v_i - o|**2 of queries and keys that count, one sequence and one KV head: summed over keys [G, T], over queries [T].

    If the logit of key i is off by a small e_i, the output o = sum p_i v_i moves by sum_i p_i e_i (v_i - o). For independent errors
    of variance q C q^T, C the covariance of a key's error, the expected square of that is a query's weight times q C q^T: so the mean
    of weight * q^T q is the metric in which keys are to be exact. Queries that rest on a sink, most of them, hardly count.

    Args:
        q: [G, T, D], the queries of a GQA group. k, v: [T, D]. All float32, finite.
        scale: of the scores.
    """
    tokens = k.shape[0]
    place = torch.arange(tokens, device=k.device)
    # |v - o|**2 = |v|**2 - 2 v.o + |o|**2: one product gives the three sums over keys, another those over queries.
    value = torch.cat((v.square().sum(-1, keepdim=True), torch.ones_like(v[:, :1]), -2 * v), 1)
    of_query, of_key = torch.zeros(q.shape[:2], device=q.device), torch.zeros(tokens, device=q.device)
    for first in range(SINKS + NEAREST, tokens, BLOCK):
        own = place[first : first + BLOCK]
        last = int(own[-1]) + 1
        scores = (q[:, own] @ k[:last].T).mul_(scale).masked_fill_(place[:last] > own[:, None], -torch.inf)
        p = scores.softmax(-1)
        out = p @ v[:last]
        out = torch.cat((torch.ones_like(out[..., :1]), out.square().sum(-1, keepdim=True), out), -1)
        p.square_()[..., :SINKS] = 0
        p.masked_fill_(place[:last] > own[:, None] - NEAREST, 0)
        of_query[:, own] = ((p @ value[:last]) * out).sum(-1).clamp_(min=0)
        of_key[:last] += ((p.mT @ out).sum(0) * value[:last]).sum(-1).clamp_(min=0)
    return of_query, of_key
