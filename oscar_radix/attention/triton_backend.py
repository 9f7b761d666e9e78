"""Attention over a mixed-precision store with Triton kernels; the plain-torch backend is its specification."""

from dataclasses import dataclass

import torch

from oscar_radix.attention.plan import WritePlan
from oscar_radix.codec.stepped import SteppedCodec
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.kernels.decode import decode, has_fast_kernels, list_hot_pages
from oscar_radix.kernels.extend import block_tokens, extend_prefix
from oscar_radix.kernels.merge import merge_states
from oscar_radix.kernels.seal import seal
from oscar_radix.kernels.write import write_decode, write_rows
from oscar_radix.pool.store import KVStore

RECORD_PROGRAMS = 16
"""One-warp programs of 128 registers that a multiprocessor holds: the records' split-KV fills the GPU exactly once."""

GENERAL_PROGRAMS = 4
"""Programs a multiprocessor of the general stage 1."""

HOT_PROGRAMS = 4
"""Programs a multiprocessor over hot rows, of which there are few."""

LARGEST_HOT_SPLIT = 16

LARGEST_SPLIT = 256
"""Upper limit of the splits of one sequence, so that the combine reads them in one tile."""


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
    """A prefill batch: `write` of its ForwardPlan, slots int64 [T], numbers of new tokens, whether any sequence has a prefix, and
    what `extend_prefix` takes as sequences and blocks."""

    write: WritePlan
    slots: torch.Tensor
    lengths: list[int]
    has_prefix: bool
    sequences: tuple[torch.Tensor, ...]
    blocks: tuple[torch.Tensor, torch.Tensor]


def query_blocks(lengths: list[int], group: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and first position of each block of query tokens, for `group` query heads a KV head: int32 [N] each."""
    pairs = [(request, first) for request, length in enumerate(lengths) for first in range(0, length, block_tokens(group))]
    request, first = torch.tensor(pairs, dtype=torch.int32).T.contiguous().to(device)
    return request, first


class TritonAttention:
    """`decode` and `extend` of one layer. Decode makes no host decision, so that CUDA graphs capture it."""

    def __init__(self, store: KVStore, max_requests: int, max_tokens: int):
        """`max_requests` in a decode step, of at most `max_tokens` each."""
        self.store = store
        device = store.device
        geometry = store.geometry
        self._fast = has_fast_kernels(geometry.head_dim, geometry.group)
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        self._programs = (RECORD_PROGRAMS if self._fast else GENERAL_PROGRAMS) * multiprocessors
        rows = max(count * sum(self.splits(count)) for count in range(1, max_requests + 1))
        self._partial = torch.empty(rows * geometry.query_heads * geometry.head_dim, dtype=torch.float32, device=device)
        self._lse = torch.empty(rows * geometry.query_heads, dtype=torch.float32, device=device)
        largest = min(-(-max_tokens // PAGE_TOKENS), store.hot.capacity)
        self._hot_pages = torch.zeros(max_requests, largest, dtype=torch.int32, device=device)
        self._hot_counts = torch.zeros(max_requests, 4, dtype=torch.int32, device=device)

    def splits(self, batch: int) -> tuple[int, int]:
        """Splits of each sequence's records and of its hot pages; the records' fill the GPU once."""
        records = max(1, min(LARGEST_SPLIT, self._programs // (batch * self.store.geometry.kv_heads)))
        hot = max(2, min(LARGEST_HOT_SPLIT, records * HOT_PROGRAMS // RECORD_PROGRAMS)) if self._fast else 0
        return records, hot

    def prepare_decode(self, batch: "DecodeBatch") -> None:
        """Once a step, before the layers: which pages of each request hold hot rows."""
        count = len(batch.rows)
        hot = (self._hot_pages[:count], self._hot_counts[:count])
        list_hot_pages((batch.req_to_token, batch.rows, batch.lengths), self.store.hot.device_levels, hot)

    def decode(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: DecodeBatch, softmax_scale: float
    ) -> torch.Tensor:
        """One token a request: q [B, Hq, D], k and v [B, Hkv, D]; returns [B, Hq, D] in q's dtype."""
        codec, hot = self._codec(), self.store.hot
        count, query_heads, dim = q.shape
        query = torch.empty(count, query_heads, dim, dtype=torch.float32, device=q.device)
        hot_rows = (hot.k_rows[layer], hot.v_rows[layer], hot.scales[layer])
        write_decode(q, k, v, batch.slots, codec.basis_parameters(layer), hot_rows, hot.device_block_table, query, self.store.bad_rows)
        seal(batch.slots, hot_rows, self._records(layer), codec.seal_parameters(layer), hot.device_block_table, newest_slots=True)
        splits = self.splits(count)
        total = sum(splits)
        workspace = (
            self._partial[: count * query_heads * total * dim].view(count, query_heads, total, dim),
            self._lse[: count * query_heads * total].view(count, query_heads, total),
        )
        out = torch.empty_like(query, dtype=q.dtype)
        decode(
            query,
            self._layer_cache(layer),
            (hot.device_block_table, hot.device_levels),
            codec.key_parameters(layer),
            codec.value_parameters(layer),
            (batch.req_to_token, batch.rows, batch.lengths),
            (self._hot_pages[:count], self._hot_counts[:count]),
            workspace,
            splits,
            out,
            softmax_scale,
        )
        return out

    def extend(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: ExtendBatch, softmax_scale: float
    ) -> torch.Tensor:
        """New tokens of a prefill batch: q [T, Hq, D], k and v [T, Hkv, D]; returns [T, Hq, D] in q's dtype."""
        codec, hot, plan = self._codec(), self.store.hot, batch.write
        key, value = codec.keys_to_basis(layer, k).contiguous(), codec.values_to_basis(layer, v).contiguous()
        rows = (
            torch.empty_like(key, dtype=torch.int8),
            torch.empty_like(value, dtype=torch.int8),
            torch.empty(*key.shape[:2], 2, dtype=torch.float16, device=key.device),
        )
        hot_rows = (hot.k_rows[layer], hot.v_rows[layer], hot.scales[layer])
        write_rows(key, value, batch.slots, hot_rows, hot.device_block_table, rows, self.store.bad_rows)
        parameters = codec.seal_parameters(layer)
        seal(plan.seal_pages, hot_rows, self._records(layer), parameters, hot.device_block_table)
        seal(plan.direct_pages, rows, self._records(layer), parameters, starts=plan.direct_tokens[:, 0].contiguous())
        own, own_lse = self._own_chunk(layer, q, k, v, batch.lengths, softmax_scale)
        if not batch.has_prefix:
            return own
        query = codec.queries_to_basis(layer, q).contiguous()
        prefix, prefix_lse = torch.empty_like(query), torch.empty(query.shape[:2], dtype=torch.float32, device=q.device)
        tables = (hot.device_block_table, hot.device_levels)
        extend_prefix(
            query,
            self._layer_cache(layer),
            tables,
            codec.key_parameters(layer),
            batch.sequences,
            batch.blocks,
            prefix,
            prefix_lse,
            softmax_scale,
        )
        out, _ = merge_states(codec.output_from_basis(layer, prefix), prefix_lse, own.float(), own_lse)
        return out.to(q.dtype)

    def _own_chunk(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], softmax_scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of each sequence's new tokens among themselves, unquantised: [T, Hq, D] in q's dtype, lse [T, Hq].

        The scores of the cache are q (k - mu); here they are q k, so q mu is taken off the log-sum-exp.
        """
        codec, group = self.store.codec, self.store.geometry.group
        k = torch.where(k.isfinite().all(-1, keepdim=True), k, codec.key_mean[layer].to(k.dtype))
        v = torch.where(v.isfinite().all(-1, keepdim=True), v, codec.value_mean[layer].to(v.dtype))
        key, value = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        outs, lses = [], []
        for rows in zip(*(x.split(lengths) for x in (q, key, value)), strict=True):
            by_head = (x.transpose(0, 1).unsqueeze(0) for x in rows)
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*by_head, 0.0, True, scale=softmax_scale)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].transpose(0, 1))
        mean = codec.key_mean[layer].repeat_interleave(group, dim=0)
        offset = (q.float() * mean).sum(dim=-1) * softmax_scale
        return torch.cat(outs).contiguous(), torch.cat(lses) - offset

    def _codec(self) -> SteppedCodec:
        codec = self.store.codec
        if not isinstance(codec, SteppedCodec):
            raise NotImplementedError(f"recipe '{codec.recipe_name}' has no Triton kernels; use 'tck' or 'mulm'")
        return codec

    def _records(self, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        base = self.store.base
        return base.k_codes[layer], base.v_codes[layer], base.scales[layer]

    def _layer_cache(self, layer: int) -> tuple[torch.Tensor, ...]:
        hot = self.store.hot
        return (*self._records(layer), hot.k_rows[layer], hot.v_rows[layer], hot.scales[layer], hot.row_masks[layer])
