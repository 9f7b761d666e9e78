"""How much the errors of quantised keys hurt: the weight with which a query counts in the metric of K, and a key in its mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

SINKS = 64
NEAREST = 64
"""Keys that count stand behind the sinks and at least this far before the query; the nearest are int8 when they are read. A whole recent
window would leave few keys to count in a sequence of 1,024 tokens.
"""
BLOCK = 256
"""Queries at a time, so that a block's probabilities stay in a CPU's cache."""


@dataclass
class Damage:
    """Sums over one sequence and one KV head, over the queries and keys that count.

    queries [G, T], keys [T]: p_i**2 |v_i - o|**2, over keys and over queries. values, outputs, 0-dim: p_i**2 |v_i|**2 and |o|**2; count:
    queries in these two.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor
    count: int


def damage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Damage:
    """What errors of 2-bit keys and values would do to the outputs of one sequence.

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
    zeros = lambda *shape: torch.zeros(shape, device=q.device)  # noqa: E731
    sums = Damage(zeros(*q.shape[:2]), zeros(tokens), zeros(), zeros(), q.shape[0] * max(0, tokens - SINKS - NEAREST))
    for first in range(SINKS + NEAREST, tokens, BLOCK):
        own = place[first : first + BLOCK]
        last = int(own[-1]) + 1
        scores = (q[:, own] @ k[:last].T).mul_(scale).masked_fill_(place[:last] > own[:, None], -torch.inf)
        p = scores.softmax(-1)
        out = p @ v[:last]
        out = torch.cat((torch.ones_like(out[..., :1]), out.square().sum(-1, keepdim=True), out), -1)
        p.square_()[..., :SINKS] = 0
        p.masked_fill_(place[:last] > own[:, None] - NEAREST, 0)
        of_value = p @ value[:last]
        sums.queries[:, own] = (of_value * out).sum(-1).clamp_(min=0)
        sums.keys[:last] += ((p.mT @ out).sum(0) * value[:last]).sum(-1).clamp_(min=0)
        sums.values += of_value[..., 0].sum()
        sums.outputs += out[..., 1].sum()
    return sums
