"""Attention over a mixed-precision store, in plain torch: the specification of the kernels."""

import torch

from oscar_radix.attention.mass import MassSample
from oscar_radix.attention.plan import ForwardPlan, ReadPlan, WritePlan
from oscar_radix.codec.int8_rows import dequantise_rows, quantise_rows
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.kernels.attend import attend
from oscar_radix.kernels.merge import merge_states
from oscar_radix.pool.hot_pool import Rows
from oscar_radix.pool.store import KVStore


class TorchAttention:
    """`run` writes a layer's new rows, seals the pages that became full, and attends; one call a layer.

    Partial results over base records, hot rows of base pages, whole pages and the own chunk merge by their log-sum-exp.
    All of them live in the codec's basis; the result leaves it at the end.
    """

    def __init__(self, store: KVStore):
        self.store = store
        self.sample: MassSample | None = None
        """Where a sampled forward's queries are kept; None, the default, keeps none."""

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: ForwardPlan, scale: float) -> torch.Tensor:
        """Attention output of the forward's T tokens.

        Args:
            layer: layer index of this rank.
            q: [T, Hq, D] after the position embedding.
            k, v: [T, Hkv, D].
            plan: of this forward, from `plan_forward`.
            scale: multiplies q k^T.

        Returns:
            [T, Hq, D] in q's dtype.
        """
        codec = self.store.codec
        key, value, rows = self._rows(layer, k, v)
        self._write(layer, rows, plan.write)
        query = codec.queries_to_basis(layer, q)
        out = torch.empty_like(query)
        for request, read in enumerate(plan.reads):
            span = slice(read.start, read.end)
            own = (key[span], value[span]) if read.own_chunk else None
            out[span], lse = self._attend(layer, query[span], read, own, scale)
            if self.sample is not None:
                self.sample.keep(layer, request, query[span], lse)
        return codec.output_from_basis(layer, out).to(q.dtype)

    def _rows(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Rows]:
        """Keys and values in the basis (bad rows zeroed), and their int8 rows."""
        key = self.store.codec.keys_to_basis(layer, k)
        value = self.store.codec.values_to_basis(layer, v)
        k8, k_scale, bad_k = quantise_rows(key)
        v8, v_scale, bad_v = quantise_rows(value)
        self.store.bad_rows += (bad_k.sum() + bad_v.sum()).to(torch.int32)
        key = key.masked_fill(bad_k[..., None], 0.0)
        value = value.masked_fill(bad_v[..., None], 0.0)
        return key, value, Rows(k8, k_scale, v8, v_scale)

    def _write(self, layer: int, rows: Rows, plan: WritePlan) -> None:
        self.store.hot.write(layer, plan.blocks, plan.places, rows[plan.tokens])
        if len(plan.seal_pages):
            self.store.seal(layer, plan.seal_pages, self.store.hot.read(layer, plan.seal_blocks))
        if len(plan.direct_pages):
            whole = rows[plan.direct_tokens]  # [N, 32, Hkv, ...]
            by_head = Rows(*(tensor.transpose(1, 2) for tensor in (whole.k, whole.k_scale, whole.v, whole.v_scale)))
            self.store.seal(layer, plan.direct_pages, by_head)

    def _attend(
        self, layer: int, query: torch.Tensor, read: ReadPlan, own: tuple[torch.Tensor, torch.Tensor] | None, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = []
        if len(read.base_pages):
            k, v, mask = self._base(layer, read)
            states.append(attend(query, k, v, scale, mask))
        for _, blocks in read.partial:
            k, v = self._hot(layer, blocks)
            states.append(attend(query, k, v, scale))
        if read.whole_rows:
            k, v = self._hot(layer, read.whole_blocks)
            states.append(attend(query, k[:, : read.whole_rows], v[:, : read.whole_rows], scale))
        if own is not None:
            tokens = len(query)
            causal = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
            states.append(attend(query, own[0].transpose(0, 1), own[1].transpose(0, 1), scale, causal))
        out, lse = states[0]
        for other, other_lse in states[1:]:
            out, lse = merge_states(out, lse, other, other_lse)
        return out, lse

    def _base(self, layer: int, read: ReadPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values of the base pages [Hkv, N * 32, D], and a mask [Hkv, 1, N * 32] that leaves out hot rows."""
        key, value = self.store.codec.open(layer, *self.store.records(layer, read.base_pages))
        mask = None
        if read.partial:
            hot = (self.store.hot.row_masks[layer, read.base_pages][..., None] >> torch.arange(PAGE_TOKENS, device=key.device)) & 1
            mask = (hot == 0).transpose(0, 1).reshape(key.shape[1], 1, -1)
        return _by_head(key), _by_head(value), mask

    def _hot(self, layer: int, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of hot rows, [Hkv, N * r, D]."""
        rows = self.store.hot.read(layer, blocks)
        return _by_head(dequantise_rows(rows.k, rows.k_scale)), _by_head(dequantise_rows(rows.v, rows.v_scale))


def _by_head(rows: torch.Tensor) -> torch.Tensor:
    """[N, Hkv, r, D] to [Hkv, N * r, D]."""
    return rows.transpose(0, 1).reshape(rows.shape[1], -1, rows.shape[3])
