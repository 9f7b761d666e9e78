"""SGLang's RadixCache with our page states: owners, continuation points, hot rows of duplicates."""

import time
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, InsertResult, MatchPrefixParams, MatchResult
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, default_radix_cache_factory

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.patches.host_pages import note_pages, pages_of, read_pages
from oscar_radix.pool.integrity import check_integrity
from oscar_radix.pool.store import KVStore

MOST_NODES = 2000
"""Nodes in a report: about 150 bytes of JSON each."""


def build_tree(ctx: TreeCacheBuildContext) -> Any:
    """Factory of the radix cache backend `oscar`; with --disable-radix-cache SGLang's own chunk cache does."""
    if ctx.params.disable:
        return default_radix_cache_factory(ctx)
    return OscarRadixCache(ctx.params)


class OscarRadixCache(RadixCache):
    """Nodes, locks and eviction are SGLang's; this class tells the store what becomes of pages.

    The pages of nodes and of running requests are known on the host (`host_pages`, `store.requests`), so nothing here waits for the
    device, with the exceptions that `_row_pages` names.
    """

    def __init__(self, params: CacheInitParams):
        self.store: KVStore = params.token_to_kv_pool_allocator.store
        self.recent_pages = self.store.residency.recent_tokens // PAGE_TOKENS
        self._caching_unfinished = False
        self._row: np.ndarray | None = None
        """Pages of the request that is being cached."""
        super().__init__(params)

    # Match -----------------------------------------------------------------------------------------------------------

    def match_prefix(self, params: MatchPrefixParams) -> MatchResult:
        """Longest cached prefix that a reader can continue from.

        A reader continues with the tokens before the end of the match as its recent window. Where they are no longer hot, and have no
        copy in host memory, the match is shortened, by the recent window at most, and the reader computes that part again; when it enters
        the tree as a duplicate, its hot rows stay with the tree's pages, so that the next reader finds them.
        """
        result = super().match_prefix(params)
        pages = self._path_pages(result.last_device_node)
        if len(pages):
            note_pages(result.device_indices, pages)
            self.store.touch(pages)
        if self._caching_unfinished:
            return result
        kept = self._continuable(pages)
        if kept == len(pages):
            return result
        self.store.want_continuation(pages[-self.recent_pages :])
        key = params.key.page_aligned(self.page_size)[: kept * PAGE_TOKENS]
        if kept == 0:
            return self._empty_match_result
        values, node = self._match_prefix_helper(self.root_node, key)
        indices = torch.cat(values)
        note_pages(indices, pages[:kept])
        return MatchResult(indices, node, node, node)

    def _continuable(self, pages: np.ndarray) -> int:
        """Pages of the longest prefix of `pages` that ends in a window at int8, but never more than the window less."""
        whole = self.store.can_be_whole(pages)
        shortest = max(0, len(pages) - self.recent_pages)
        for end in range(len(pages), shortest, -1):
            if whole[max(0, end - self.recent_pages) : end].all():
                return end
        return shortest

    # Insert ----------------------------------------------------------------------------------------------------------

    def insert(self, params: InsertParams) -> InsertResult:
        """Add a sequence. The tree takes over its new pages, and the hot rows of pages that it had already."""
        pages = read_pages(params.value[::PAGE_TOKENS]) if self._row is None else self._row[: len(params.value) // PAGE_TOKENS]
        result = super().insert(params)
        known = result.prefix_len // PAGE_TOKENS
        if known < len(pages):
            note_pages(result.last_device_node.value, pages[known:].copy())
        ours = self._path_pages(result.last_device_node)
        duplicate = np.flatnonzero(pages[:known] != ours[:known])
        self.store.adopt_hot_rows(pages[duplicate], ours[duplicate])
        self.store.enter_tree(pages[known:])
        if not params.chunked:
            self.store.end_prefill(ours)
        return result

    def cache_unfinished_req(self, req: Any, chunked: bool = False) -> None:
        """A request's full pages enter the tree after prefill, or after a chunk of it."""
        self._row = self._row_pages(req, len(req.get_fill_ids()))
        self._caching_unfinished = True
        try:
            with self.token_to_kv_pool_allocator.freeing_row(self._row):
                super().cache_unfinished_req(req, chunked)
        finally:
            self._caching_unfinished = False
            self._row = None
        self.store.requests.replace_start(req.req_pool_idx, self._stamp(req), self._path_pages(req.last_node))

    def cache_finished_req(self, req: Any, is_insert: bool = True, *, kv_len_to_handle: int) -> None:
        """A finished (or retracted) request's full pages enter the tree; its last ones are where the next turn continues."""
        self._row = self._row_pages(req, kv_len_to_handle)
        self.store.end_prefill(self._row[: kv_len_to_handle // PAGE_TOKENS])
        try:
            with self.token_to_kv_pool_allocator.freeing_row(self._row):
                super().cache_finished_req(req, is_insert, kv_len_to_handle=kv_len_to_handle)
        finally:
            self._row = None
        self.store.requests.drop(req.req_pool_idx)
        if is_insert and not self.disable_finished_insert:
            tokens = (req.origin_input_ids + req.output_ids)[:kv_len_to_handle]
            leaf = super().match_prefix(MatchPrefixParams(key=RadixKey(tokens, req.extra_key)))
            self._mark_continuation_points(leaf.last_device_node)

    def _row_pages(self, req: Any, tokens: int) -> np.ndarray:
        """Pages of a request's first `tokens` tokens, int64; read from the device when the host's list is not this request's."""
        row, requests = req.req_pool_idx, self.store.requests
        if requests.covers(row, self._stamp(req), tokens):
            return requests.of(row)[: -(-tokens // PAGE_TOKENS)].copy()
        return read_pages(self.req_to_token_pool.req_to_token[row, :tokens:PAGE_TOKENS])

    def _stamp(self, req: Any) -> int:
        """What tells this request from earlier and later ones in the same row."""
        return int(self.req_to_token_pool.req_generation[req.req_pool_idx])

    def _mark_continuation_points(self, node: Any) -> None:
        """Readers continue where this sequence ends and where its path branches, and nowhere else on it."""
        ends, count = [], 0
        for part in self._path(node):
            count += len(pages_of(part.value))
            if len(part.children) != 1:
                ends.append(count)
        self.store.set_continuation_points(self._path_pages(node), ends, self.recent_pages)

    # Nodes -----------------------------------------------------------------------------------------------------------

    def _split_node(self, key: RadixKey, child: Any, split_len: int) -> Any:
        pages = pages_of(child.value)
        front = super()._split_node(key, child, split_len)
        note_pages(front.value, pages[: split_len // PAGE_TOKENS])
        note_pages(child.value, pages[split_len // PAGE_TOKENS :])
        return front

    def _path(self, node: Any) -> list[Any]:
        """Nodes from below the root to `node`."""
        path = []
        while node is not self.root_node:
            path.append(node)
            node = node.parent
        return path[::-1]

    def _path_pages(self, node: Any) -> np.ndarray:
        """Pages of all tokens up to the end of `node`: int64."""
        return np.concatenate([np.zeros(0, dtype=np.int64), *(pages_of(part.value) for part in self._path(node))])

    # Reports ---------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Nodes for `oscar-radix tree`, parents before children: the MOST_NODES that were used last, and how many are left out."""
        now = time.monotonic()
        # A node is used whenever a child of it is, so that no kept node loses its parent.
        nodes = sorted(self._nodes(), key=lambda node: (-node.last_access_time, node.id))
        kept = {node.id for node in nodes[:MOST_NODES]}
        listed = []
        stack = list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            if node.id not in kept:
                continue
            parent = None if node.parent is self.root_node else node.parent.id
            about = {"id": node.id, "parent": parent, "tokens": len(node.value), "readers": node.lock_ref}
            listed.append({**about, "idle_s": round(now - node.last_access_time, 3), **self.store.describe_pages(pages_of(node.value))})
            stack.extend(node.children.values())
        return {"nodes": listed, "left_out": len(nodes) - len(listed)}

    # Checks ----------------------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Recount owners and bytes against the tree and the allocator's free list."""
        tree = np.concatenate([np.zeros(0, dtype=np.int64), *(read_pages(node.value[::PAGE_TOKENS]) for node in self._nodes())])
        check_integrity(self.store, self.token_to_kv_pool_allocator.free_page_numbers, tree)

    def _nodes(self) -> list[Any]:
        found, stack = [], list(self.root_node.children.values())
        while stack:
            node = stack.pop()
            found.append(node)
            stack.extend(node.children.values())
        return found
