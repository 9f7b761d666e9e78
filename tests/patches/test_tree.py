"""The radix tree over our pages: whatever requests do, every page and every hot block has exactly one owner."""

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.patches.host_pages import noted_pages
from oscar_radix.pool.pages import Owner
from tests.helpers import make_store
from tests.mini_server import TINY, MiniServer, Request, tokens_of

CONTEXT = 640


prompts = st.builds(tokens_of, st.lists(st.sampled_from([1, 2]), min_size=1, max_size=8), st.integers(0, PAGE_TOKENS + 5))
extra_keys = st.sampled_from([None, None, None, "adapter"])


class TreeMachine(RuleBasedStateMachine):
    """Random traffic on a tiny server. Only `prepare` runs, not attention: owners and levels are what counts here."""

    @initialize(
        pages=st.integers(10, 48),
        hot_pages=st.integers(4, 24),
        policy=st.sampled_from(["window", "none", "random", "attention"]),
        recent_pages=st.integers(1, 3),
        eviction_policy=st.sampled_from(["lru", "lfu"]),
        host_pages=st.sampled_from([0, 0, 6, 60]),
    )
    def build(self, pages, hot_pages, policy, recent_pages, eviction_policy, host_pages):
        store = make_store(pages, hot_pages, policy, recent_pages * PAGE_TOKENS, geometry=TINY, host_pages=host_pages)
        self.server = MiniServer(store, requests=4, context=CONTEXT, eviction_policy=eviction_policy)
        self.store = store
        self.recent_pages = recent_pages
        self.known: list[tuple[str | None, list[int]]] = []

    # What may happen -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.server.can_start())
    @rule(prompt=prompts, extra_key=extra_keys, chunk=st.integers(1, 200))
    def a_request_arrives(self, prompt, extra_key, chunk):
        self.prefill([(self.arrive(prompt, extra_key), chunk)])

    @precondition(lambda self: self.server.can_start())
    @rule(prompt=prompts, extra_key=extra_keys, chunk=st.integers(20, 200), answer=st.integers(0, 70))
    def a_request_is_served_at_once(self, prompt, extra_key, chunk, answer):
        request = self.arrive(prompt, extra_key)
        while request.prompt_left > 0 and self.prefill([(request, chunk)]):
            pass
        if request.prompt_left > 0:
            self.server.finish(request, insert=False)
            return
        self.generate([request], answer)
        self.finish(request)

    @precondition(lambda self: self.prefilling())
    @rule(data=st.data(), chunk=st.integers(1, 200))
    def some_prompts_are_prefilled_further(self, data, chunk):
        chosen = data.draw(st.lists(st.sampled_from(self.prefilling()), min_size=1, max_size=3, unique_by=id))
        self.prefill([(request, chunk) for request in chosen])

    @precondition(lambda self: self.decoding())
    @rule(data=st.data(), steps=st.integers(1, 40))
    def some_requests_generate(self, data, steps):
        self.generate(data.draw(st.lists(st.sampled_from(self.decoding()), min_size=1, max_size=3, unique_by=id)), steps)

    @precondition(lambda self: self.decoding())
    @rule(data=st.data())
    def a_request_finishes(self, data):
        self.finish(data.draw(st.sampled_from(self.decoding())))

    @precondition(lambda self: self.server.running)
    @rule(data=st.data())
    def a_request_is_retracted(self, data):
        self.server.finish(data.draw(st.sampled_from(self.server.running)), insert=False)

    @rule(tokens=st.integers(1, 8 * PAGE_TOKENS))
    def the_tree_evicts(self, tokens):
        before, evictable = self.server.allocator.available_size(), self.server.tree.evictable_size()
        self.server.tree.evict(EvictParams(num_tokens=tokens))
        assert self.server.allocator.available_size() - before >= min(tokens, evictable)

    @rule(data=st.data())
    def rows_are_dropped(self, data):
        """Demotion of any sealed page at any time is safe: a later policy may do it."""
        hot = np.flatnonzero(self.store.table.sealed & (self.store.hot.levels > 0)).tolist()
        if hot:
            for page in data.draw(st.lists(st.sampled_from(hot), min_size=1, max_size=8, unique=True)):
                self.store.residency.demote(page, 0)

    @precondition(lambda self: self.known)
    @rule()
    def an_idle_server_is_flushed(self):
        for request in list(self.server.running):
            self.server.finish(request, insert=False)
        self.server.flush()
        self.known.clear()
        assert (self.store.table.owner[1:] == Owner.FREE).all()
        assert self.store.hot.free_blocks == self.store.hot.capacity

    @rule(tokens=prompts)
    def somebody_looks_a_prefix_up(self, tokens):
        self.check_match(self.server.match(tokens), self.server.stock_match(tokens), tokens, None)

    # What must hold after every step ---------------------------------------------------------------------------------

    @invariant()
    def owners_and_bytes_add_up(self):
        if hasattr(self, "server"):
            self.server.tree.check_integrity()

    @invariant()
    def no_page_has_two_owners(self):
        """Counted anew from the requests' rows, not from the page table's own records."""
        if not hasattr(self, "server"):
            return
        tails = []
        for request in self.server.running:
            protected = request.cache_protected_len // PAGE_TOKENS
            pages = self.server.pages_of(request)
            assert (self.store.table.owner[pages[:protected]] == Owner.TREE).all()
            tails.extend(pages[protected:].tolist())
        assert len(set(tails)) == len(tails)
        assert sorted(tails) == np.flatnonzero(self.store.table.owner == Owner.REQUEST).tolist()
        free = self.server.allocator.available_size() // PAGE_TOKENS
        in_tree = self.server.tree.total_size() // PAGE_TOKENS
        assert free + in_tree + len(tails) == self.store.pages

    @invariant()
    def nothing_unsealed_loses_rows(self):
        """Bytes that exist only once, as int8 rows of a partial page, are all there."""
        if hasattr(self, "server"):
            for request in self.server.running:
                pages, full = self.server.pages_of(request), request.kv_committed_len // PAGE_TOKENS
                assert self.store.table.sealed[pages[:full]].all()
                assert not self.store.table.sealed[pages[full:]].any()
                assert self.store.is_whole(pages[full:]).all()

    @invariant()
    def the_host_knows_what_the_device_holds(self):
        """Free list, tree nodes and page lists, and nobody had to read them."""
        if not hasattr(self, "server"):
            return
        allocator, requests = self.server.allocator, self.store.requests
        assert allocator.free_pages.tolist() == allocator.free_page_numbers.tolist()
        for node in self.server.tree._nodes():
            assert noted_pages(node.value).tolist() == (node.value[::PAGE_TOKENS] // PAGE_TOKENS).tolist()
        for request in self.server.running:
            if request.req_pool_idx is not None:
                assert requests.of(request.req_pool_idx).tolist() == self.server.pages_of(request).tolist()
        assert requests.decode_rows_read_back == requests.prefill_rows_read_back == 0

    def teardown(self):
        if hasattr(self, "server"):
            for request in list(self.server.running):
                self.server.finish(request, insert=False)
            assert self.server.tree.protected_size() == 0
            self.server.tree.evict(EvictParams(num_tokens=self.store.pages * PAGE_TOKENS))
            self.server.tree.check_integrity()
            assert self.server.allocator.available_size() == self.store.pages * PAGE_TOKENS
            assert self.store.hot.free_blocks == self.store.hot.capacity

    # Helpers ---------------------------------------------------------------------------------------------------------

    def prefilling(self) -> list[Request]:
        return [request for request in self.server.running if request.prompt_left > 0]

    def decoding(self) -> list[Request]:
        return [request for request in self.server.running if request.prompt_left <= 0]

    def arrive(self, prompt: list[int], extra_key: str | None) -> Request:
        everything = self.server.stock_match(prompt[:-1], extra_key)
        request = self.server.start(prompt, extra_key)
        self.check_match(self.server.pages_of(request), everything, prompt, extra_key)
        return request

    def prefill(self, chunks: list[tuple[Request, int]]) -> bool:
        grows = [(request, min(chunk, request.prompt_left)) for request, chunk in chunks]
        if not self.server.has_room(grows):
            return False
        self.server.prefill(grows)
        for request, _ in grows:
            self.server.end_of_prefill([request])
            self.remember(request)
        return True

    def generate(self, requests: list[Request], steps: int) -> None:
        """Requests that generate the same tokens make duplicates of whole pages."""
        for step in range(steps):
            if not self.server.has_room([(request, 1) for request in requests]):
                return
            if max(request.kv_committed_len for request in requests) < CONTEXT:
                self.server.decode(requests, [700 + step % 3] * len(requests))

    def finish(self, request: Request) -> None:
        self.server.finish(request)
        self.remember(request)
        written = request.tokens[: request.kv_committed_len].tolist()
        assert len(self.server.stock_match(written, request.extra_key)) == len(written) // PAGE_TOKENS

    def remember(self, request: Request) -> None:
        self.known.append((request.extra_key, request.tokens[: request.kv_committed_len].tolist()))

    def check_match(self, pages: np.ndarray, everything: np.ndarray, tokens: list[int], extra_key: str | None) -> None:
        """A match is part of what was inserted; it ends in a window that is or can be whole, or is shortened by the window and no more."""
        longest = max((_common(tokens, known) for key, known in self.known if key == extra_key), default=0)
        assert len(everything) <= longest // PAGE_TOKENS
        assert np.array_equal(pages, everything[: len(pages)])
        shortest = max(0, len(everything) - self.recent_pages)
        ends = [end for end in range(shortest + 1, len(everything) + 1) if self.hot_before(everything, end)]
        assert len(pages) == max(ends, default=shortest)

    def hot_before(self, pages: np.ndarray, end: int) -> bool:
        return bool(self.store.can_be_whole(pages[max(0, end - self.recent_pages) : end]).all())


def _common(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


TestTree = TreeMachine.TestCase
TestTree.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
