"""Page lists on the host: right whatever happened to the notes, read from the device only when something is amiss, and then counted."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from oscar_radix.patches import forward_pages
from oscar_radix.patches.forward_pages import ForwardPages, init_new
from oscar_radix.patches.host_pages import note_pages
from tests.helpers import make_store
from tests.mini_server import TINY, MiniServer, Request, tokens_of


def make_server(radix: bool = True, graphs: bool = True) -> MiniServer:
    return MiniServer(make_store(pages=60, hot_pages=30, recent_tokens=64, geometry=TINY), radix=radix, graphs=graphs)


def prefilled(server: MiniServer, prompt: list[int]) -> Request:
    request = server.start(prompt)
    server.prefill([(request, request.prompt_left)])
    server.end_of_prefill([request])
    return request


def check(server: MiniServer, decode: int, prefill: int = 0) -> None:
    """Every list is what the device's table says, and that many rows were read from it."""
    requests = server.store.requests
    for request in server.running:
        assert requests.of(request.req_pool_idx).tolist() == server.pages_of(request).tolist()
    assert (requests.decode_rows_read_back, requests.prefill_rows_read_back) == (decode, prefill)


@pytest.fixture
def intercept(monkeypatch):
    """Change a forward before its pages are looked up."""

    def install(server: MiniServer, change) -> None:
        original = server.pages.decode
        monkeypatch.setattr(server.pages, "decode", lambda forward: original(change(forward)))

    return install


@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("graphs", [True, False])
def test_ordinary_traffic_reads_nothing(radix, graphs):
    server = make_server(radix, graphs)
    requests = [prefilled(server, tokens_of([1, 2, 3], tail=tail)) for tail in (3, 31, 7)]
    for step in range(70):
        server.decode(requests, [500 + step] * 3)
        check(server, decode=0)
    server.finish(requests.pop(1))
    server.decode(requests, [1, 2])
    server.finish(requests.pop(0), insert=False)
    requests.append(prefilled(server, tokens_of([1, 2, 9, 9, 9, 9], tail=1)))
    server.decode(requests, [1, 2])
    check(server, decode=0)


def test_a_chunked_prompt_whose_pages_turn_out_to_be_duplicates():
    """The second request computes what the first one has put into the tree meanwhile; its list follows its row."""
    server = make_server()
    prompt = tokens_of([1, 2, 3, 4, 5, 6], tail=9)
    twins = [server.start(prompt) for _ in range(2)]
    for chunk in (50, 90, len(prompt) - 140):
        for twin in twins:
            server.prefill([(twin, chunk)])
        server.end_of_prefill(twins)
        check(server, decode=0)
    first, second = (server.store.requests.of(twin.req_pool_idx) for twin in twins)
    assert first[:6].tolist() == second[:6].tolist()
    server.decode(twins, [1, 1])
    check(server, decode=0)


def test_duplicates_are_found_while_the_next_step_is_on_its_way():
    """With overlap scheduling a decode step is launched before the prefill before it has entered the tree."""
    server = make_server()
    prompt = tokens_of([1, 2, 3], tail=31)
    twins = [server.start(prompt) for _ in range(2)]
    server.prefill([(twin, len(prompt)) for twin in twins])
    server.decode(twins, [1, 1])
    for twin in twins:
        twin.kv_committed_len -= 1
        server.end_of_prefill([twin])
        twin.kv_committed_len += 1
    for _ in range(3):
        server.decode(twins, [1, 1])
        check(server, decode=0)


@pytest.mark.parametrize("tail", [5, 31])
def test_a_forward_that_nobody_announced_costs_a_read(tail, intercept):
    """Of all its rows; `tail` 31: the step begins a page."""

    def lose(forward):
        forward.out_cache_loc = forward.out_cache_loc.clone()
        return forward

    server = make_server()
    requests = [prefilled(server, tokens_of([1, 2], tail=tail)), prefilled(server, tokens_of([3], tail=6))]
    server.decode(requests, [7, 7])
    intercept(server, lose)
    server.decode(requests, [7, 7])
    check(server, decode=2)


@pytest.mark.parametrize(("tail", "reads"), [(5, 0), (31, 1)])
def test_lost_new_pages_cost_a_read_where_they_are_needed(tail, reads, monkeypatch):
    server = make_server()
    requests = [prefilled(server, tokens_of([1, 2], tail=tail)), prefilled(server, tokens_of([3], tail=6))]
    server.decode(requests, [7, 7])
    monkeypatch.setattr(forward_pages, "noted_new_pages", lambda slots: None)
    server.decode(requests, [7, 7])
    check(server, decode=reads)


def test_a_step_that_never_ran_costs_a_read():
    server = make_server()
    request = prefilled(server, tokens_of([1, 2], tail=32))
    lengths = torch.tensor([request.kv_committed_len + 1])
    row = server.rows.req_to_token[request.req_pool_idx]
    slot = server.allocator.alloc_decode(lengths, lengths, row[request.kv_committed_len - 1 : request.kv_committed_len])
    server.rows.write((request.req_pool_idx, request.kv_committed_len), slot[0].to(torch.int32))
    request.output_ids.append(5)
    request.kv_committed_len += 1
    server.decode([request], [6])
    check(server, decode=1)
    for step in range(40):
        server.decode([request], [step])
    check(server, decode=1)


def test_the_list_of_another_request_in_the_same_row_is_not_used():
    """It is as long as it should be; only its stamp says that it is not this request's."""
    server = make_server()
    request = prefilled(server, tokens_of([1, 2], tail=5))
    requests, row = server.store.requests, request.req_pool_idx
    requests.pages[row] = 0
    requests.stamps[row] -= 1
    server.decode([request], [1])
    check(server, decode=1)


def test_padding_rows_of_a_graph_are_left_out(intercept):
    def pad(forward):
        forward.seq_lens_cpu = torch.cat([forward.seq_lens_cpu, torch.ones(5, dtype=torch.int64)])
        forward.req_pool_indices = torch.cat([forward.req_pool_indices, torch.zeros(5, dtype=torch.int64)])
        return forward

    server = make_server()
    requests = [prefilled(server, tokens_of([1, 2], tail=tail)) for tail in (5, 30)]
    intercept(server, pad)
    for step in range(40):
        server.decode(requests, [step, step])
        check(server, decode=0)


def test_a_forward_of_nobody_plans_nothing():
    """A warm-up batch: padding rows only, and no note."""
    server = make_server()
    forward = SimpleNamespace(
        seq_lens_cpu=torch.ones(4, dtype=torch.int64),
        req_pool_indices=torch.zeros(4, dtype=torch.int64),
        out_cache_loc=torch.zeros(4, dtype=torch.int64),
    )
    step = server.pages.decode(forward)
    assert len(step.rows) == 0
    server.store.residency.prepare_decode(step)
    check(server, decode=0)


def test_a_matched_prefix_without_a_note_costs_a_read():
    server = make_server()
    first = prefilled(server, tokens_of([1, 2, 3]))
    server.finish(first)
    second = server.start(tokens_of([1, 2, 3, 4], tail=3))
    assert len(second.prefix_indices)
    second.prefix_indices = second.prefix_indices.clone()
    server.prefill([(second, second.prompt_left)])
    check(server, decode=0, prefill=1)


def test_the_hook_announces_forwards_to_our_backend_alone():
    """As SGLang calls it; to another backend it does nothing."""
    server = make_server()
    slots, prefix = torch.zeros(2, dtype=torch.int64), torch.zeros(32, dtype=torch.int64)
    note_pages(prefix, np.array([4]))
    forward = SimpleNamespace(out_cache_loc=slots, batch_size=2, forward_mode=ForwardMode.EXTEND, rids=["a", "b"])
    batch = SimpleNamespace(
        req_pool_indices_cpu=torch.tensor([5, 3]),
        reqs=[SimpleNamespace(prefix_indices=prefix), SimpleNamespace(prefix_indices=torch.zeros(0))],
    )
    for backend in (SimpleNamespace(), SimpleNamespace(pages="something else"), SimpleNamespace(pages=server.pages)):
        assert server.pages._lookup(forward) is None
        assert init_new(lambda *_, **__: forward, object, batch, SimpleNamespace(attn_backend=backend)) is forward
    announced = server.pages._lookup(forward)
    assert announced.rows.tolist() == [5, 3]
    assert announced.prefixes[0].tolist() == [4]
    assert announced.prefixes[1] is None
    assert server.pages._lookup(SimpleNamespace(out_cache_loc=slots.clone(), rids=["a", "b"])) is None, "equal, but another forward"


@pytest.mark.parametrize("missing", ["rows", "slots", "one row"])
def test_a_batch_without_rows_on_the_host_is_not_announced(missing):
    pages: ForwardPages = make_server().pages
    forward = SimpleNamespace(
        out_cache_loc=None if missing == "slots" else torch.zeros(2), batch_size=2, forward_mode=ForwardMode.DECODE, rids=["a", "b"]
    )
    rows = {"rows": None, "slots": torch.tensor([1, 2]), "one row": torch.tensor([1])}[missing]
    pages.announce(forward, SimpleNamespace(req_pool_indices_cpu=rows, reqs=[]))
    assert pages._lookup(forward) is None
