"""A scheduler in one object: SGLang's tree, allocator and request table with our adapters, driven step by step.

Every step does what SGLang 0.5.17's scheduler does with the prefix cache, in the same order, on one thread: match and lock, allocate
(after evicting the shortfall), plan the forward, then cache the unfinished or finished request.
"""

from array import array
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.chunk_cache import ChunkCache
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from oscar_radix.attention.plan import ForwardPlan, plan_decode, plan_forward
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.patches.allocator import OscarPageAllocator
from oscar_radix.patches.forward_pages import ForwardPages
from oscar_radix.patches.radix import OscarRadixCache
from oscar_radix.pool.hot_pool import PAGE_BLOCKS
from oscar_radix.pool.store import KVStore
from oscar_radix.pool.upload import upload

TINY = Geometry(layers=1, kv_heads=1, query_heads=1, head_dim=64)
"""Where only owners and levels count."""


def tokens_of(blocks: list[int], tail: int = 0) -> list[int]:
    """A token sequence of whole pages: equal blocks are equal pages, so sequences share prefixes often."""
    body = [block * 100 + i for block in blocks for i in range(PAGE_TOKENS)]
    return body + [900 + i for i in range(tail)]


@dataclass(eq=False)
class Request:
    """The attributes of SGLang's Req that RadixCache, ChunkCache and ReqToTokenPool of 0.5.17 read, and no others."""

    origin_input_ids: array
    output_ids: array = field(default_factory=lambda: array("q"))
    extra_key: str | None = None
    priority: int = 0
    req_pool_idx: int | None = None
    prefix_indices: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    last_node: Any = None
    cache_protected_len: int = 0
    inflight_middle_chunks: int = 0
    kv_committed_len: int = 0
    """Tokens whose K and V are written."""

    @property
    def extend_range(self) -> SimpleNamespace:
        return SimpleNamespace(end=self.kv_committed_len)

    @property
    def tokens(self) -> array:
        return self.origin_input_ids + self.output_ids

    def get_fill_ids(self) -> array:
        return self.tokens[: self.kv_committed_len]

    @property
    def prompt_left(self) -> int:
        return len(self.origin_input_ids) - self.kv_committed_len


class MiniServer:
    """Runs requests over a store. `radix=False` serves without a prefix cache, as --disable-radix-cache does.

    `graphs`: decode forwards reach the backend as SGLang's graph runner hands them on, else as its eager runner does.
    """

    def __init__(
        self,
        store: KVStore,
        radix: bool = True,
        requests: int = 8,
        context: int = 1024,
        eviction_policy: str = "lru",
        graphs: bool = True,
    ):
        self.store = store
        self.graphs = graphs
        self.device = str(store.device)
        self.rows = ReqToTokenPool(requests, context, self.device, enable_memory_saver=False)
        self.allocator = OscarPageAllocator(store, store.pages * PAGE_TOKENS, torch.bfloat16, self.device, kvcache=None)
        params = CacheInitParams(
            disable=not radix,
            req_to_token_pool=self.rows,
            token_to_kv_pool_allocator=self.allocator,
            page_size=PAGE_TOKENS,
            eviction_policy=eviction_policy,
        )
        self.tree = OscarRadixCache(params) if radix else ChunkCache(params)
        self.pages = ForwardPages(self.rows, store.requests)
        self.running: list[Request] = []

    # Steps of the scheduler ------------------------------------------------------------------------------------------

    def can_start(self) -> bool:
        """A request has a partial page, and while one is prefilled past its end, a second one: the hot pool must have room for both."""
        return len(self.running) < min(self.rows.size, self.store.hot.capacity // PAGE_BLOCKS // 2)

    def start(self, prompt: list[int], extra_key: str | None = None) -> Request:
        """Admit a request: match its prompt (but for the last token) and lock what it found."""
        request = Request(array("q", prompt), extra_key=extra_key)
        key = RadixKey(request.origin_input_ids, extra_key, limit=len(prompt) - 1)
        found = self.tree.match_prefix(MatchPrefixParams(key=key))
        request.prefix_indices, request.last_node = found.device_indices, found.last_device_node
        request.cache_protected_len = request.kv_committed_len = len(found.device_indices)
        self.tree.inc_lock_ref(request.last_node)
        self.running.append(request)
        return request

    def has_room(self, grows: list[tuple[Request, int]]) -> bool:
        """As many pages are free or evictable as these requests need to grow by these many tokens, overestimated as SGLang does."""
        evictable = 0 if self.tree.is_chunk_cache() else self.tree.evictable_size()
        return sum(grow + PAGE_TOKENS for _, grow in grows) <= self.allocator.available_size() + evictable

    def prefill(self, grows: list[tuple[Request, int]]) -> ForwardPlan:
        """One extend forward; each request computes that many more prompt tokens. Call `end_of_prefill` when it has run."""
        requests = [request for request, _ in grows]
        lengths = torch.tensor([request.kv_committed_len + grow for request, grow in grows])
        prefixes = torch.tensor([request.kv_committed_len for request in requests])
        self._evict_shortfall(int((lengths - prefixes).sum()) + len(grows) * PAGE_TOKENS)
        self.rows.alloc(requests)
        none = torch.full((1,), -1, device=self.device)
        last = torch.cat([r.prefix_indices[-1:] if len(r.prefix_indices) else none for r in requests])
        count = int((lengths - prefixes).sum())
        slots = self.allocator.alloc_extend(self._send(prefixes), prefixes, self._send(lengths), lengths, last, count)
        for request, own in zip(requests, slots.split((lengths - prefixes).tolist()), strict=True):
            start = request.kv_committed_len
            self.rows.write((request.req_pool_idx, slice(0, start)), request.prefix_indices.to(torch.int32))
            self.rows.write((request.req_pool_idx, slice(start, start + len(own))), own.to(torch.int32))
        return self._plan(requests, slots, [grow for _, grow in grows], decode=False)

    def end_of_prefill(self, requests: list[Request]) -> None:
        """Full pages enter the tree, after the last chunk as after those before it."""
        for request in requests:
            self.tree.cache_unfinished_req(request, chunked=request.prompt_left > 0)

    def decode(self, requests: list[Request], tokens: list[int]) -> ForwardPlan:
        """One decode forward: `tokens` were sampled last, and are computed now."""
        for request, token in zip(requests, tokens, strict=True):
            request.output_ids.append(token)
        lengths = torch.tensor([request.kv_committed_len + 1 for request in requests])
        self._evict_shortfall(len(requests) * PAGE_TOKENS)
        last = torch.stack([self.rows.req_to_token[r.req_pool_idx, r.kv_committed_len - 1] for r in requests]).long()
        slots = self.allocator.alloc_decode(self._send(lengths), lengths, last)
        for request, slot in zip(requests, slots.unbind(), strict=True):
            self.rows.write((request.req_pool_idx, request.kv_committed_len), slot.to(torch.int32))
        return self._plan(requests, slots, [1] * len(requests), decode=True)

    def finish(self, request: Request, insert: bool = True) -> None:
        """End a request; `insert=False` is what retraction does."""
        self.running.remove(request)
        if request.req_pool_idx is None:  # aborted before its first forward
            self.tree.dec_lock_ref(request.last_node)
            return
        self.tree.cache_finished_req(request, is_insert=insert, kv_len_to_handle=request.kv_committed_len)
        self.rows.free(request)

    def flush(self) -> None:
        """POST /flush_cache of an idle server."""
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()

    # Looking inside --------------------------------------------------------------------------------------------------

    def pages_of(self, request: Request) -> np.ndarray:
        """Pages of the tokens that are written, in order."""
        if request.req_pool_idx is None:
            return (request.prefix_indices[::PAGE_TOKENS] // PAGE_TOKENS).numpy()
        slots = self.rows.req_to_token[request.req_pool_idx, : request.kv_committed_len : PAGE_TOKENS]
        return (slots // PAGE_TOKENS).numpy().astype(np.int64)

    def stock_match(self, tokens: list[int], extra_key: str | None = None) -> np.ndarray:
        """Pages that SGLang's own tree would return, whether their end is hot or not."""
        found = RadixCache.match_prefix(self.tree, MatchPrefixParams(key=RadixKey(array("q", tokens), extra_key)))
        return (found.device_indices[::PAGE_TOKENS] // PAGE_TOKENS).numpy()

    def match(self, tokens: list[int], extra_key: str | None = None) -> np.ndarray:
        """Pages that a new reader of these tokens gets."""
        found = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens), extra_key)))
        return (found.device_indices[::PAGE_TOKENS] // PAGE_TOKENS).numpy()

    def _plan(self, requests: list[Request], slots: torch.Tensor, grows: list[int], decode: bool) -> ForwardPlan:
        prefixes = [request.kv_committed_len for request in requests]
        for request, grow in zip(requests, grows, strict=True):
            request.kv_committed_len += grow
        rows = torch.tensor([request.req_pool_idx for request in requests])
        mode = ForwardMode.DECODE if decode else ForwardMode.EXTEND
        fields = {
            "forward_mode": mode,
            "batch_size": len(requests),
            "req_pool_indices": self._send(rows),
            "seq_lens_cpu": torch.tensor([request.kv_committed_len for request in requests]),
            "extend_prefix_lens_cpu": None if decode else prefixes,
        }
        forward = SimpleNamespace(**fields, out_cache_loc=slots, rids=[str(id(request)) for request in requests])
        self.pages.announce(forward, SimpleNamespace(req_pool_indices_cpu=rows, reqs=requests))
        if decode and self.graphs:
            view = SimpleNamespace(**fields, out_cache_loc=slots)
        else:
            view = SimpleNamespace(**fields, out_cache_loc=slots.clone(), rids=forward.rids)
        if decode:
            return plan_decode(self.store, self.pages.decode(view))
        return plan_forward(self.store, self.pages.extend(view))

    def _send(self, values: torch.Tensor) -> torch.Tensor:
        return upload(values.numpy(), self.store.device)

    def _evict_shortfall(self, tokens: int) -> None:
        short = tokens - self.allocator.available_size()
        if short > 0:
            self.tree.evict(EvictParams(num_tokens=short))
