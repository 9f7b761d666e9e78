"""The radix tree over our pages, one story a test: what is hit, what is shortened, who gets whose rows."""

import numpy as np
import pytest

from oscar_radix.geometry import PAGE_TOKENS
from tests.helpers import make_store
from tests.mini_server import TINY, MiniServer, tokens_of


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


@pytest.mark.parametrize("policy", ["window", "none", "random", "attention"])
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
