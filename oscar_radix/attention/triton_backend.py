"""Attention over a mixed-precision store with Triton kernels; the plain-torch backend is its specification."""

from dataclasses import dataclass

import torch

from oscar_radix.attention.layer_views import LayerViews
from oscar_radix.attention.mass import MassSample
from oscar_radix.attention.plan import WritePlan
from oscar_radix.codec.stepped import SteppedCodec
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.kernels.capability import compute_capability
from oscar_radix.kernels.decode import decode
from oscar_radix.kernels.decode_plan import DecodePlan, decode_parts, plan_decode
from oscar_radix.kernels.extend import extend
from oscar_radix.kernels.extend_dense import DenseBuffers, extend_dense
from oscar_radix.kernels.extend_plan import ExtendPlan, plan_extend
from oscar_radix.kernels.keep_queries import keep_queries
from oscar_radix.kernels.leave_basis import leave_basis
from oscar_radix.kernels.seal import seal
from oscar_radix.kernels.write import write_decode
from oscar_radix.kernels.write_prefill import PrefillRows, write_prefill
from oscar_radix.pool.store import KVStore

LOG2_E = 1.4426950408889634

WORD_BYTES = 4
"""Kernels address words with 32 bits."""


@dataclass(frozen=True)
class DecodeBatch:
    """Addresses of a decode step's inputs; a CUDA graph replays with new contents behind them.

    req_to_token int32 [R, C]; rows, lengths, slots int64 [B]: row of req_to_token, tokens with the new one, the new one's slot.
    """

    req_to_token: torch.Tensor
    rows: torch.Tensor
    lengths: torch.Tensor
    slots: torch.Tensor


@dataclass(frozen=True)
class ExtendBatch:
    """A prefill batch: `write` of its ForwardPlan, slots int64 [T], what `extend` takes as sequences, and its plan on the device; for a
    sampled batch the rows of `last_rows`, int64 [B, queries]. `starts` int64 [N] and the buffers serve one layer after the other."""

    write: WritePlan
    slots: torch.Tensor
    sequences: tuple[torch.Tensor, ...]
    plan: ExtendPlan
    starts: torch.Tensor
    prefill: PrefillRows
    dense: DenseBuffers | None
    sample_rows: torch.Tensor | None = None


class TritonAttention:
    """`decode` and `extend` of one layer. Decode makes no host decision, so that CUDA graphs capture it."""

    def __init__(self, store: KVStore, max_requests: int, max_tokens: int):
        """`max_requests` in a decode step, of at most `max_tokens` each.

        Raises:
            ValueError: when a layer's keys are more than the kernels can address.
        """
        self.store = store
        self.sample: MassSample | None = None
        """Of decode steps; set before CUDA graphs are captured, or never."""
        self.prefill_sample: MassSample | None = None
        """Of prefill batches that name `sample_rows`."""
        device = store.device
        geometry = store.geometry
        size, limit = max(store.base.k_codes[0].nbytes, store.hot.k_rows[0].nbytes), 2**31 * WORD_BYTES
        if size >= limit:
            raise ValueError(
                f"the keys of one layer take {size / 2**30:.1f} GiB on this rank; the kernels address {limit / 2**30:.0f} GiB: "
                "lower --max-total-tokens or raise --tp-size"
            )
        self._multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._no_mean = torch.zeros(geometry.kv_heads, geometry.head_dim, dtype=torch.float32, device=device)
        parts = self.parts(max_requests)
        rows = geometry.query_heads * (parts + max_requests)
        self._partial = torch.empty(rows * geometry.head_dim, dtype=torch.float32, device=device)
        self._lse = torch.empty(rows, dtype=torch.float32, device=device)
        pages = -(-max_tokens // PAGE_TOKENS)
        self._viewed: tuple[SteppedCodec, tuple[int, ...]] | None = None
        self._views: dict[int, LayerViews] = {}
        self._plan = DecodePlan.empty(max_requests, pages, min(pages, store.hot.capacity), parts, device)

    def parts(self, batch: int) -> int:
        """Parts of a decode step, see `decode_plan`."""
        return decode_parts(batch, self.store.geometry.kv_heads, self.store.geometry.group, self._multiprocessors)

    def decode_plan(self, batch: int) -> DecodePlan:
        """Where the plan of a step of `batch` sequences is."""
        return self._plan.of(batch, self.parts(batch))

    def plan_extend(self, prefixes: list[int], lengths: list[int]) -> ExtendPlan:
        """The host's plan of a prefill batch, from its numbers of cached and new tokens."""
        geometry = self.store.geometry
        dense_exists = compute_capability(self._no_mean) == 9
        return plan_extend(
            prefixes, lengths, geometry.kv_heads, geometry.group, geometry.head_dim, self._multiprocessors, dense_exists=dense_exists
        )

    def extend_batch(
        self,
        write: WritePlan,
        slots: torch.Tensor,
        sequences: tuple[torch.Tensor, ...],
        plan: ExtendPlan,
        sample_rows: torch.Tensor | None = None,
    ) -> ExtendBatch:
        """A prefill batch from parts on the device, with the buffers that its layers share."""
        geometry, device = self.store.geometry, slots.device
        shape = (len(slots), geometry.query_heads, geometry.head_dim)
        # Opened rows of the prefix, if any, then those of the new tokens.
        scratch = plan.rounds.scratch_rows if plan.rounds else 0
        size = (scratch + len(slots), geometry.kv_heads, geometry.head_dim)
        opened = tuple(torch.empty(size, dtype=torch.float16, device=device) for _ in range(2))
        prefill = PrefillRows.empty(shape, tuple(each[scratch:] for each in opened))
        dense = DenseBuffers.empty(opened, plan, shape) if plan.rounds else None
        starts = write.direct_tokens[:, 0].contiguous()
        return ExtendBatch(write, slots, sequences, plan, starts, prefill, dense, sample_rows)

    def prepare_decode(self, batch: "DecodeBatch") -> None:
        """Once a step, before the layers: its plan."""
        sequences = (batch.req_to_token, batch.rows, batch.lengths)
        plan_decode(sequences, self.store.hot.device_levels, self.decode_plan(len(batch.rows)))

    def decode(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: DecodeBatch, softmax_scale: float
    ) -> torch.Tensor:
        """One token a request: q [B, Hq, D], k and v [B, Hkv, D]; returns [B, Hq, D] in q's dtype."""
        views, hot = self._views_of(layer), self.store.hot
        count, query_heads, dim = q.shape
        query, lse = self._kept(layer, count)
        rotate = not self.store.codec.values_folded
        table = hot.device_block_table
        write_decode(q, k, v, batch.slots, views.basis, views.hot_rows, table, query, self.store.bad_rows, rotate)
        seal(batch.slots, views.hot_rows, views.records, views.seal, table, newest_slots=True, low=views.low)
        slots = self.parts(count) + count
        workspace = (
            self._partial[: query_heads * slots * dim].view(query_heads, slots, dim),
            self._lse[: query_heads * slots].view(query_heads, slots),
        )
        out = torch.empty_like(query, dtype=q.dtype)
        plan = self.decode_plan(count)
        decode(
            query, views.cache, table, views.keys, views.values, batch.lengths, plan, workspace, out, softmax_scale, rotate, lse, views.low
        )
        return out

    def _kept(self, layer: int, count: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Where a decode step's queries and their log-sum-exp go: to the sample, if it has a place for each request."""
        if self.sample is not None and count <= self.sample.query.shape[1]:
            return self.sample.query[layer, :count, 0], self.sample.lse[layer, :count, 0]
        geometry = self.store.geometry
        return torch.empty(count, geometry.query_heads, geometry.head_dim, dtype=torch.float32, device=self.store.device), None

    def extend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: ExtendBatch, softmax_scale: float
    ) -> torch.Tensor:
        """New tokens of a prefill batch: q [T, Hq, D], k and v [T, Hkv, D]; returns [T, Hq, D] in q's dtype."""
        views, table, rows = self._views_of(layer), self.store.hot.device_block_table, batch.prefill
        folded = self.store.codec.values_folded
        write_prefill(
            q, k, v, batch.slots, views.basis, views.hot_rows, table, rows, softmax_scale * LOG2_E, self.store.bad_rows, not folded
        )
        seal(batch.write.seal_pages, views.hot_rows, views.records, views.seal, table, low=views.low)
        seal(batch.write.direct_pages, rows.int8, views.records, views.seal, starts=batch.starts, low=views.low)
        query, out = rows.query, torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sampled = self.prefill_sample is not None and batch.sample_rows is not None
        lse = torch.empty(query.shape[:2], dtype=torch.float32, device=q.device) if sampled else None
        target, mean = (out, views.values[1]) if folded else (torch.empty_like(query), self._no_mean)
        cache = (views.cache, table, views.keys, mean, batch.sequences)
        if batch.dense:
            extend_dense(query, batch.dense, *cache, batch.plan, target, lse, views.low)
        else:
            extend(query, rows.own, *cache, batch.plan.blocks, batch.plan.splits, target, lse, views.low)
        if lse is not None:
            # The kernel's queries carry the softmax scale and log2(e), and are fp16.
            rows, kept = batch.sample_rows, self.prefill_sample
            factor = 1 / (softmax_scale * LOG2_E)
            keep_queries(query, lse, rows, kept.query[layer, : len(rows)], kept.lse[layer, : len(rows)], factor)
        if not folded:
            leave_basis(target, *views.values, out)
        return out

    def _views_of(self, layer: int) -> LayerViews:
        codec = self.store.codec
        if (codec, codec.refined) != self._viewed:
            if not isinstance(codec, SteppedCodec):
                raise NotImplementedError(f"recipe '{codec.recipe_name}' has no Triton kernels; use 'tck' or 'mulm'")
            self._viewed, self._views = (codec, codec.refined), {}
        if layer not in self._views:
            self._views[layer] = LayerViews.of(self.store, codec, layer)
        return self._views[layer]
