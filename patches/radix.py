"""SGLang's RadixCache with our page states: owners, continuation points, hot rows of duplicates."""

from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, default_radix_cache_factory

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.store import KVStore


def build_tree(ctx: TreeCacheBuildContext) -> Any:
    """Factory of the radix cache backend `oscar`; with --disable-radix-cache SGLang's own chunk cache does."""
    if ctx.params.disable:
        return default_radix_cache_factory(ctx)
    return OscarRadixCache(ctx.params)


class OscarRadixCache(RadixCache):
    """Nodes, locks and eviction are SGLang's; this class tells the store what becomes of pages."""

    def __init__(self, params: CacheInitParams):
        self.store: KVStore = params.token_to_kv_pool_allocator.store
        self.recent_pages = self.store.residency.recent_tokens // PAGE_TOKENS
        self._caching_unfinished = False
        super().__init__(params)

    # Match -----------------------------------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Longest cached prefix that a reader can continue from.

        A reader continues with the tokens before the end of the match as its recent window. Where they are no longer hot,
        the match is shortened, by the recent window at most, and the reader computes that part again; when it enters the tree as a
        duplicate, its hot rows stay with the tree's pages, so that the next reader finds them.
        """
        result = super().match_prefix(params)
        if self._caching_unfinished:
            return result
        pages = _pages(result.device_indices)
        kept = self._continuable(pages)
        if kept == len(pages):
            return result
        self.store.want_continuation(pages[-self.recent_pages :])
        key = params.key.page_aligned(self.page_size)[: kept * PAGE_TOKENS]
        if kept == 0:
            return self._empty_match_result
        values, node = self._match_prefix_helper(self.root_node, key)
        return MatchResult(torch.cat(values), node, node, node)

    def _continuable(self, pages: np.ndarray) -> int:
        """Pages of the longest prefix of `pages` that ends in a hot window, but never more than the window less."""
        whole = self.store.is_whole(pages)
        shortest = max(0, len(pages) - self.recent_pages)
        for end in range(len(pages), shortest, -1):
            if whole[max(0, end - self.recent_pages) : end].all():
                return end
        return shortest

    # Insert ----------------------------------------------------------------------------------------------------------

    def insert(self, params: InsertParams) -> InsertResult:
        """Add a sequence. The tree takes over its new pages, and the hot rows of pages that it had already."""
        pages = _pages(params.value)
        result = super().insert(params)
        known = result.prefix_len // PAGE_TOKENS
        ours = _pages(super().match_prefix(MatchPrefixParams(key=params.key)).device_indices)
        duplicate = np.flatnonzero(pages[:known] != ours[:known])
        self.store.adopt_hot_rows(pages[duplicate], ours[duplicate])
        self.store.enter_tree(pages[known:])
        if not params.chunked:
            self.store.end_prefill(ours)
        return result

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        """A request's full pages enter the tree after prefill, or after a chunk of it."""
        self._caching_unfinished = True
        try:
            super().cache_unfinished_req(req, chunked)
        finally:
            self._caching_unfinished = False

    def cache_finished_req(self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
        """A finished (or retracted) request's full pages enter the tree; its last ones are where the next turn continues."""
        row = self.req_to_token_pool.req_to_token[req.req_pool_idx, :kv_len_to_handle]
        pages = _pages(row[: kv_len_to_handle // PAGE_TOKENS * PAGE_TOKENS])
        self.store.end_prefill(pages)
        super().cache_finished_req(req, is_insert, kv_len_to_handle=kv_len_to_handle)
        if is_insert and not self.disable_finished_insert:
            tokens = (req.origin_input_ids + req.output_ids)[:kv_len_to_handle]
            leaf = super().match_prefix(MatchPrefixParams(key=RadixKey(tokens, req.extra_key)))
            self._mark_continuation_points(leaf.last_device_node)

    def _mark_continuation_points(self, node: Any) -> None:
        """Readers continue where this sequence ends and where its path branches, and nowhere else on it."""
        path = []
        while node is not self.root_node:
            path.append(node)
            node = node.parent
        pages, ends, count = [np.zeros(0, dtype=np.int64)], [], 0
        for node in reversed(path):
            pages.append(_pages(node.value))
            count += len(pages[-1])
            if len(node.children) != 1:
                ends.append(count)
        self.store.set_continuation_points(np.concatenate(pages), ends, self.recent_pages)

    # Checks ----------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Recount owners and bytes against the tree and the allocator's free list."""
        tree = np.concatenate([np.zeros(0, dtype=np.int64), *(_pages(node.value) for node in self._nodes())])
        self.store.check_integrity(self.token_to_kv_pool_allocator.free_pages.cpu().numpy(), tree)

    def _nodes(self) -> list[Any]:
        found, stack = [], list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return found


def _pages(slots: torch.Tensor) -> np.ndarray:
    """Pages of page-aligned slots, in order: int64 [N]."""
    return (slots[::PAGE_TOKENS] // PAGE_TOKENS).cpu().numpy().astype(np.int64)
