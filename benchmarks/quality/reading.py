"""A prefix computed once, and many readers that continue it at the same time, through exact rows or a codec's."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oscar_radix.calibration.transformers_attention import replaced_attention
from oscar_radix.codec import Codec

NEAREST = 32
"""A query gives no mass to the tokens less than this many before it, its own page: they are hot while they are new."""
LAST_QUERIES = 64
"""The prefix's own last queries, whose mass a prefill would add."""
BLOCK = 512

ReadRows = Callable[[int], tuple[Tensor, Tensor]]
"""Layer to K and V [P, H, D] of the prefix, in the basis of the codec that reads them."""


@dataclass
class Mass:
    """Attention of some queries to the prefix, [L, H, P] each, summed over queries and the heads of a GQA group.

    first: probabilities; second: their squares; need: squared probability times the squared error that a 2-bit row makes there,
    (error of the logit)**2 |v|**2 + |error of v|**2, so first-order damage to the output when errors of tokens are independent.
    """

    first: Tensor
    second: Tensor
    need: Tensor

    @classmethod
    def zeros(cls, layers: int, heads: int, tokens: int, device: torch.device) -> "Mass":
        return cls(*(torch.zeros(layers, heads, tokens, device=device) for _ in range(3)))

    def __add__(self, other: "Mass") -> "Mass":
        return Mass(self.first + other.first, self.second + other.second, self.need + other.need)


@dataclass(frozen=True)
class Prefix:
    """Exact K and V per layer [P, H, D]; mass of all its own queries, and of its last LAST_QUERIES, to tokens NEAREST or more before."""

    keys: list[Tensor]
    values: list[Tensor]
    own: Mass
    last: Mass

    @property
    def tokens(self) -> int:
        return len(self.keys[0])


def grouped(q: Tensor, heads: int) -> Tensor:
    """Queries [N, Hq, D] as [H, G * N, D]: those that read one KV head together."""
    return q.unflatten(1, (heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def ungrouped(o: Tensor, tokens: int) -> Tensor:
    """Inverse of `grouped`."""
    return o.unflatten(1, (-1, tokens)).permute(2, 0, 1, 3).flatten(1, 2)


def compute_prefix(model: Any, ids: Tensor, layers: int, heads: int) -> Prefix:
    """Run the model exactly over ids [P]. Mass is gathered on the way, in blocks of queries."""
    tokens = len(ids)
    keys: list[Tensor] = []
    values: list[Tensor] = []
    own, last = (Mass.zeros(layers, heads, tokens, ids.device) for _ in range(2))
    positions = torch.arange(tokens, device=ids.device)

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys.append(k.clone())
        values.append(v.clone())
        out = []
        kt, vt = k.transpose(0, 1).float(), v.transpose(0, 1).float()
        for start in range(0, tokens, BLOCK):
            block, seen = q[start : start + BLOCK].float(), min(start + BLOCK, tokens)
            at = positions[start:seen]
            later = positions[:seen] > at[:, None]
            group = block.shape[1] // heads
            p = (grouped(block * scale, heads) @ kt[:, :seen].mT).masked_fill_(later.repeat(group, 1), -torch.inf).softmax(-1)
            out.append(ungrouped(p @ vt[:, :seen], len(at)))
            p.masked_fill_((positions[:seen] > (at - NEAREST)[:, None]).repeat(group, 1), 0.0)
            own.first[layer, :, :seen] += p.sum(1)
            own.second[layer, :, :seen] += p.square().sum(1)
            p.masked_fill_((at < tokens - LAST_QUERIES).repeat(group)[:, None], 0.0)
            last.first[layer, :, :seen] += p.sum(1)
            last.second[layer, :, :seen] += p.square().sum(1)
        return torch.cat(out)

    with replaced_attention(model, attention), torch.inference_mode():
        model.base_model(input_ids=ids.unsqueeze(0), use_cache=False)
    return Prefix(keys, values, own, last)


class Readers:
    """R readers of T tokens each that continue one prefix of P tokens; run as one sequence in which readers do not see each other."""

    def __init__(self, model: Any, ids: Tensor, prefix: int) -> None:
        self.model, self.ids, self.prefix = model, ids, prefix
        count, tokens = ids.shape
        self.positions = (prefix + torch.arange(tokens, device=ids.device)).repeat(count)
        own = torch.block_diag(*[torch.ones(tokens, tokens, device=ids.device).tril()] * count).bool()
        self.mask = torch.cat((torch.ones(count * tokens, prefix, dtype=torch.bool, device=ids.device), own), 1)

    def read(self, rows: ReadRows, codec: Codec | None = None, prompt: tuple[Tensor, ReadRows] | None = None) -> Tensor:
        """Log-probabilities [R, T, vocab] after each token. Readers' own rows are exact; without a codec, rows are the model's K and V.

        prompt: bool [R, T], tokens that read the prefix in other rows than `rows`; and those.
        """
        with torch.inference_mode():
            hidden = self._hidden(rows, codec, None, prompt)
            return self.model.lm_head(hidden.view(*self.ids.shape, -1)).float().log_softmax(-1)

    def mass(self, rows: ReadRows, better: ReadRows, codec: Codec, layers: int, heads: int) -> Mass:
        """What the readers' attention, read through `rows`, gave to the prefix; `better`: rows that their error is measured against."""
        mass = Mass.zeros(layers, heads, self.prefix, self.ids.device)

        def gather(layer: int, q: Tensor, p: Tensor) -> None:
            (k, v), (k_better, v_better) = rows(layer), better(layer)
            p = p[..., : self.prefix]
            logit = (q @ (k - k_better).permute(1, 2, 0)).square()
            size, error = (x.square().sum(-1).T.unsqueeze(1) for x in (v_better, v - v_better))
            mass.first[layer] += p.sum(1)
            mass.second[layer] += p.square().sum(1)
            mass.need[layer] += (p.square() * (logit * size + error)).sum(1)

        with torch.inference_mode():
            self._hidden(rows, codec, gather)
        return mass

    def _hidden(
        self,
        rows: ReadRows,
        codec: Codec | None,
        gather: Callable[[int, Tensor, Tensor], None] | None,
        prompt: tuple[Tensor, ReadRows] | None = None,
    ) -> Tensor:
        """Last hidden states of all readers; `gather` gets scaled queries [H, G * N, D] and probabilities [H, G * N, P + N] per layer."""

        def through(read: ReadRows, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            tokens, group = q.shape[0], q.shape[1] // k.shape[1]
            old_k, old_v = read(layer)
            keys, values = torch.cat((old_k, k)).transpose(0, 1), torch.cat((old_v, v)).transpose(0, 1)
            queries, mask = grouped(q, k.shape[1]), self.mask.repeat(group, 1)
            if gather is None:
                queries, keys, values = (x.unsqueeze(0) for x in (queries, keys, values))
                out = torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)[0]
            else:
                p = (queries * scale @ keys.mT).masked_fill_(~mask, -torch.inf).softmax(-1)
                gather(layer, queries * scale, p)
                out = p @ values
            return ungrouped(out, tokens)

        def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            if codec is not None:
                q, k, v = codec.queries_to_basis(layer, q), codec.keys_to_basis(layer, k), codec.values_to_basis(layer, v)
            out = through(rows, layer, q, k, v, scale)
            if prompt is not None:
                out = torch.where(prompt[0].view(-1, 1, 1), through(prompt[1], layer, q, k, v, scale), out)
            return out if codec is None else codec.output_from_basis(layer, out)

        with replaced_attention(self.model, attention):
            return self.model.base_model(input_ids=self.ids.view(1, -1), position_ids=self.positions.unsqueeze(0), use_cache=False)[0]
