"""The radix tree over our pages: whatever requests do, every page and every hot block has exactly one owner."""

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sglang.srt.mem_cache.base_prefix_cache import EvictParams

from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.pool.pages import Owner
from tests.helpers import make_store
from tests.mini_server import MiniServer, Request

TINY = Geometry(layers=1, kv_heads=1, query_heads=1, head_dim=64)
CONTEXT = 640


def tokens_of(blocks: list[int], tail: int = 0) -> list[int]:
    """A token sequence of whole pages: equal blocks are equal pages, so sequences share prefixes often."""
    body = [block * 100 + i for block in blocks for i in range(PAGE_TOKENS)]
    return body + [900 + i for i in range(tail)]


prompts = st.builds(tokens_of, st.lists(st.sampled_from([1, 2]), min_size=1, max_size=8), st.integers(0, PAGE_TOKENS + 5))
extra_keys = st.sampled_from([None, None, None, "adapter"])


class TreeMachine(RuleBasedStateMachine):
    """Random traffic on a tiny server. Only `prepare` runs, not attention: owners and levels are what counts here."""

    @initialize(
        pages=st.integers(10, 48),
        hot_pages=st.integers(4, 24),
        policy=st.sampled_from(["window", "none", "random"]),
        recent_pages=st.integers(1, 3),
        eviction_policy=st.sampled_from(["lru", "lfu"]),
    )
    def build(self, pages, hot_pages, policy, recent_pages, eviction_policy):
        store = make_store(pages, hot_pages, policy, recent_pages * PAGE_TOKENS, geometry=TINY)
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
        """A match is part of what was inserted; it ends in a hot window, or is shortened by the window and no more."""
        longest = max((_common(tokens, known) for key, known in self.known if key == extra_key), default=0)
        assert len(everything) <= longest // PAGE_TOKENS
        assert np.array_equal(pages, everything[: len(pages)])
        shortest = max(0, len(everything) - self.recent_pages)
        ends = [end for end in range(shortest + 1, len(everything) + 1) if self.hot_before(everything, end)]
        assert len(pages) == max(ends, default=shortest)

    def hot_before(self, pages: np.ndarray, end: int) -> bool:
        return bool(self.store.is_whole(pages[max(0, end - self.recent_pages) : end]).all())


def _common(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


TestTree = TreeMachine.TestCase
TestTree.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# Single stories ------------------------------------------------------------------------------------------------------


def serve(server: MiniServer, prompt: list[int], answer: int = 0, chunk: int = 10_000, extra_key: str | None = None) -> int:
    """A whole request; returns its cached tokens."""
    request = server.start(prompt, extra_key)
    cached = request.kv_committed_len
    while request.prompt_left > 0:
        server.prefill([(request, min(chunk, request.prompt_left))])
        server.end_of_prefill([request])
    for step in range(answer):
        server.decode([request], [500 + step])
    server.finish(request)
    server.tree.check_integrity()
    return cached


def answered(prompt: list[int], answer: int) -> list[int]:
    return prompt + [500 + step for step in range(answer)]


def test_the_whole_conversation_is_cached_generated_tokens_too():
    server = MiniServer(make_store(pages=40, hot_pages=20, recent_tokens=64, geometry=TINY))
    first = tokens_of([1, 2, 3], tail=7)
    assert serve(server, first, answer=40) == 0
    written = len(first) + 40
    assert serve(server, [*answered(first, 40), 1, 2, 3], answer=5) == written // PAGE_TOKENS * PAGE_TOKENS


@pytest.mark.parametrize("policy", ["window", "none", "random"])
@pytest.mark.parametrize("chunk", [1, 17, 32, 50, 64, 100, 288])
def test_a_hit_does_not_depend_on_how_the_prompt_was_chunked(chunk, policy):
    prompt = tokens_of([1, 2, 3, 4, 5, 6, 7, 8, 9])
    server = MiniServer(make_store(pages=40, hot_pages=14, policy=policy, recent_tokens=96, geometry=TINY))
    serve(server, prompt, chunk=chunk)
    assert len(server.match(prompt)) == 9
    assert serve(server, [*prompt, 5], chunk=chunk) == len(prompt)


def make_cold_end(policy: str = "none") -> tuple[MiniServer, list[int], np.ndarray]:
    """A cached prompt of 8 pages whose last pages are no longer hot; W is 2 pages."""
    server = MiniServer(make_store(pages=40, hot_pages=20, policy=policy, recent_tokens=64, geometry=TINY))
    prompt = tokens_of([1, 2, 3, 4, 5, 6, 7, 8])
    serve(server, prompt)
    pages = server.stock_match(prompt)
    for page in pages[2:].tolist():
        if server.store.hot.levels[page]:
            server.store.residency.demote(page, 0)
    return server, prompt, pages


def test_a_match_with_a_cold_end_is_shortened_by_the_window_and_no_more():
    server, prompt, pages = make_cold_end()
    assert server.match(prompt).tolist() == pages[:6].tolist()


def test_a_match_ends_where_a_window_is_hot():
    server, prompt, pages = make_cold_end()
    for page in pages[5:7].tolist():
        assert server.store.hot.acquire(page)
    assert server.match(prompt).tolist() == pages[:7].tolist(), "pages 5 and 6 are hot, so a reader can continue after page 6"


def test_recomputed_pages_give_their_hot_rows_to_the_tree():
    server, prompt, pages = make_cold_end()
    assert serve(server, [*prompt, 77]) == 6 * PAGE_TOKENS, "two pages are computed again"
    assert server.stock_match(prompt).tolist() == pages.tolist(), "the tree keeps its own pages"
    assert server.store.is_whole(pages[6:]).all(), "and they are hot again"
    assert server.match(prompt).tolist() == pages.tolist(), "so the next reader gets all of them"
    assert serve(server, [*prompt, 78]) == 8 * PAGE_TOKENS


def test_a_place_to_continue_stays_hot_once_readers_branch_there():
    """Over the forwards of others, under the policy that drops everything outside windows and continuation points. The first reader
    only makes the sequence longer; the second one makes a branch."""
    server, prompt, _ = make_cold_end(policy="none")
    cached = []
    for block in (11, 13, 15):
        cached.append(serve(server, [*prompt, *tokens_of([block] * 4)]) // PAGE_TOKENS)
        serve(server, tokens_of([20, 21, 22, 23], tail=3), answer=40)
    assert cached == [6, 6, 8]


def test_a_shared_system_prompt_stays_a_place_to_continue():
    """The branch of a tree: two conversations have ended, and a third one starts from what they share."""
    server = MiniServer(make_store(pages=60, hot_pages=30, policy="none", recent_tokens=64, geometry=TINY))
    system = tokens_of([1, 2, 3, 4, 5])
    for user in (11, 12):
        serve(server, system + tokens_of([user] * 4), answer=70)
    serve(server, tokens_of([20] * 6), answer=70)
    assert serve(server, system + tokens_of([13] * 4)) == len(system)


@pytest.mark.parametrize("chunk", [32, 45, 64])
def test_adopted_rows_stay_hot_while_the_rest_of_the_prompt_is_prefilled(chunk):
    server, prompt, pages = make_cold_end()
    request = server.start(prompt + tokens_of([9] * 6))
    while request.prompt_left > 0:
        server.prefill([(request, min(chunk, request.prompt_left))])
        server.end_of_prefill([request])
        if request.kv_committed_len >= len(prompt):
            assert server.store.is_whole(pages[6:]).all()
    server.tree.check_integrity()


def test_two_requests_that_compute_the_same_prompt_end_up_on_the_same_pages():
    server = MiniServer(make_store(pages=40, hot_pages=20, recent_tokens=64, geometry=TINY))
    prompt = tokens_of([1, 2, 3, 4], tail=3)
    twins = [server.start(prompt) for _ in range(2)]
    server.prefill([(twin, len(prompt)) for twin in twins])
    server.end_of_prefill(twins)
    first, second = (server.pages_of(twin) for twin in twins)
    assert first[:4].tolist() == second[:4].tolist()
    assert first[4] != second[4], "the partial page is each request's own"
    server.tree.check_integrity()
    assert server.allocator.available_size() == (40 - 6) * PAGE_TOKENS


def test_a_retracted_request_leaves_only_what_the_tree_had():
    server = MiniServer(make_store(pages=40, hot_pages=20, recent_tokens=64, geometry=TINY))
    request = server.start(tokens_of([1, 2, 3, 4, 5]))
    server.prefill([(request, 70)])
    server.end_of_prefill([request])
    server.prefill([(request, 60)])
    server.finish(request, insert=False)
    server.tree.check_integrity()
    assert server.tree.total_size() == 2 * PAGE_TOKENS
    assert not server.store.table.prefilling[1:].any(), "the prompt is given up: its pages no longer claim to be in progress"


def test_extra_keys_do_not_share_pages():
    server = MiniServer(make_store(pages=40, hot_pages=20, recent_tokens=64, geometry=TINY))
    prompt = tokens_of([1, 2, 3])
    serve(server, prompt, extra_key="a")
    assert len(server.match(prompt)) == 0
    assert len(server.match(prompt, "b")) == 0
    assert len(server.match(prompt, "a")) == 3


def test_integrity_names_a_lost_page():
    server = MiniServer(make_store(pages=40, hot_pages=20, recent_tokens=64, geometry=TINY))
    serve(server, tokens_of([1, 2, 3]))
    server.allocator.free_pages = server.allocator.free_pages[1:]
    with pytest.raises(RuntimeError, match="free list holds 36 pages, the page table says 37"):
        server.tree.check_integrity()


def test_integrity_names_a_page_that_is_freed_under_the_tree():
    server = MiniServer(make_store(pages=40, hot_pages=20, recent_tokens=64, geometry=TINY))
    prompt = tokens_of([1, 2, 3])
    serve(server, prompt)
    server.store.free(server.stock_match(prompt)[:1])
    with pytest.raises(RuntimeError, match="the page table says"):
        server.tree.check_integrity()
