"""Streaming moments: one pass over a model's own q, k, v, nothing kept but sums."""

import torch
from torch import Tensor

from oscar_radix.calibration.damage import damage
from oscar_radix.codec.calibration import CalibrationError
from oscar_radix.codec.moments import Moments
from oscar_radix.geometry import Geometry

TOKENS_PER_CHANNEL = 8
"""Fewest tokens per head dimension: below this, the smallest eigenvalues of a covariance are mostly noise."""


class MomentAccumulator:
    """float64 sums over any number of sequences, per layer and KV head: computed where the rows are, kept on the CPU."""

    def __init__(self, geometry: Geometry) -> None:
        g = geometry
        self.geometry = geometry
        self.skipped_rows = 0
        """Rows of q, k or v with NaN or Inf, over all layers and heads."""
        row, square = (g.layers, g.kv_heads, g.head_dim), (g.layers, g.kv_heads, g.head_dim, g.head_dim)
        self._tokens = [0] * g.layers
        names = {"count": row[:2], "query_count": row[:2], "k": row, "v": row, "wv": row, "kk": square, "qq": square, "wvv": square}
        names |= {"damage": row[:2], "dqq": square, "key_damage": row[:2], "dk": row}
        names |= dict.fromkeys(("logit_damage", "value_damage", "output_energy", "outputs"), row[:2])
        self._sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in names.items()}

    @property
    def tokens(self) -> int:
        """Tokens that every layer has seen."""
        return min(self._tokens)

    def add(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> None:
        """One sequence from its beginning: post-RoPE q [T, Hq, D], k and v [T, H, D], any float dtype and device.

        Queries and keys are also summed with the weights of `damage.damage`, for which scores are multiplied by `scale` (D**-.5 if not
        given). Value weights are w_t = k_t C_Q k_t^T with C_Q of this sequence, scaled to a mean of 1: how much queries look at a token, up
        to second order. A token whose q, k or v has NaN or Inf in a head's group is left out of that head's sums.
        """
        g = self.geometry
        expected = ((g.query_heads, g.head_dim), (g.kv_heads, g.head_dim), (g.kv_heads, g.head_dim))
        got = tuple(tuple(x.shape[1:]) for x in (q, k, v))
        if got != expected or not len(q) == len(k) == len(v):
            shapes = [tuple(x.shape) for x in (q, k, v)]
            raise ValueError(f"q, k, v must be [T, heads, head_dim] with {expected}, got {shapes}")
        if not len(k):
            return
        k, v = (x.detach().double().transpose(0, 1) for x in (k, v))
        q = q.detach().double().unflatten(1, (g.kv_heads, g.group)).permute(1, 0, 2, 3)
        good = q.isfinite().all(-1).all(-1) & k.isfinite().all(-1) & v.isfinite().all(-1)
        self.skipped_rows += int((~good).sum())
        k, v = (torch.where(good.unsqueeze(-1), x, 0.0) for x in (k, v))
        q = torch.where(good[..., None, None], q, 0.0)
        scale = g.head_dim**-0.5 if scale is None else scale
        heads = [damage(q[h].transpose(0, 1).float(), k[h].float(), v[h].float(), scale) for h in range(g.kv_heads)]
        per_head = lambda name: torch.stack([getattr(head, name) for head in heads]).double()  # noqa: E731
        of_query = (per_head("queries") * good.unsqueeze(1)).transpose(1, 2).flatten(1)
        of_key = per_head("keys") * good
        q = q.flatten(1, 2)
        count = good.sum(-1).double()
        qq = q.mT @ q
        weight = ((k @ qq) * k).sum(-1)
        weight = weight * (count / weight.sum(-1).clamp(min=1e-300)).unsqueeze(-1)
        weighted = v * weight.unsqueeze(-1)
        added = {
            "count": count,
            "query_count": count * g.group,
            "k": k.sum(1),
            "v": v.sum(1),
            "wv": weighted.sum(1),
            "kk": k.mT @ k,
            "qq": qq,
            "wvv": weighted.mT @ v,
            "damage": of_query.sum(-1),
            "dqq": (q * of_query.unsqueeze(-1)).mT @ q,
            "key_damage": of_key.sum(-1),
            "dk": (k * of_key.unsqueeze(-1)).sum(1),
            "logit_damage": of_query.sum(-1) * scale**2,
            "value_damage": per_head("values"),
            "output_energy": per_head("outputs"),
            "outputs": count.new_tensor([head.count for head in heads]),
        }
        for name, value in added.items():
            self._sums[name][layer] += value.cpu()
        self._tokens[layer] += k.shape[1]

    def merge(self, other: "MomentAccumulator") -> None:
        """Add the sums of another accumulator of the same geometry to this one."""
        if other.geometry != self.geometry:
            raise ValueError(f"cannot merge moments of {other.geometry} into those of {self.geometry}")
        for name, total in self._sums.items():
            total += other._sums[name]
        self._tokens = [a + b for a, b in zip(self._tokens, other._tokens, strict=True)]
        self.skipped_rows += other.skipped_rows

    def finish(self) -> Moments:
        """The means; CalibrationError when a head saw too few finite tokens to fit a basis."""
        needed = TOKENS_PER_CHANNEL * self.geometry.head_dim
        fewest = int(self._sums["count"].min())
        if fewest < needed:
            raise CalibrationError(
                f"calibration saw {fewest} usable tokens (of {self.tokens}); head dim {self.geometry.head_dim} needs at least {needed}: "
                "give a longer text"
            )
        s = self._sums
        row, square = s["count"].unsqueeze(-1), s["count"][..., None, None]
        query_second = s["qq"] / s["query_count"][..., None, None]
        # No weight where no sequence was long enough, or nobody looked back.
        of_query, of_key = s["damage"][..., None, None], s["key_damage"].unsqueeze(-1)
        outputs = s["outputs"].clamp(min=1)
        return Moments(
            geometry=self.geometry,
            tokens=self.tokens,
            skipped_rows=self.skipped_rows,
            logit_damage=s["logit_damage"] / outputs,
            value_damage=s["value_damage"] / outputs,
            output_energy=s["output_energy"] / outputs,
            key_mean=s["k"] / row,
            key_damage_mean=torch.where(of_key > 0, s["dk"] / of_key.clamp(min=1e-300), s["k"] / row),
            key_second=s["kk"] / square,
            query_second=query_second,
            query_damage_second=torch.where(of_query > 0, s["dqq"] / of_query.clamp(min=1e-300), query_second),
            value_mean=s["v"] / row,
            value_weighted_mean=s["wv"] / row,
            value_weighted_second=s["wvv"] / square,
        )
