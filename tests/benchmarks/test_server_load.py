"""The client's arithmetic on made-up streams, and the client against a small server that streams like SGLang."""

import asyncio
import json
import threading

import pytest
from aiohttp import web

from benchmarks.gpu_servers import Report, decode_log
from benchmarks.server_load import Load, Stream, random_prompts, span, steady_window
from benchmarks.servers import ServerError
from benchmarks.throughput import ratios


def stream(first, step, count, tokens_at_once=1):
    """First token at `first`, then `tokens_at_once` more every `step` seconds."""
    return Stream(0.0, [first + step * n for n in range(count)], [1 + tokens_at_once * n for n in range(count)])


def test_the_window_is_where_all_requests_decode():
    # In flight: a from 1 to 4, b from 2 to 5 s, so both from 2 to 4.
    window = steady_window([stream(1.0, 0.1, 31), stream(2.0, 0.1, 31)])
    assert window.in_flight == 2
    assert window.seconds == pytest.approx(2)
    assert window.step_ms == pytest.approx(100)
    assert window.tokens_per_s == pytest.approx(20, abs=1)
    assert window.mean_step_ms == pytest.approx(100, abs=5)


def test_chunks_of_several_tokens_count_each_token():
    window = steady_window([stream(1.0, 0.5, 9, tokens_at_once=5)])
    assert window.step_ms == pytest.approx(100)
    assert window.tokens_per_s == pytest.approx(10)


def test_slow_steps_are_named():
    times = [1.0, 1.1, 1.2, 1.5, 1.6, 1.7, 1.81]
    window = steady_window([Stream(0.0, times, list(range(1, 8))), Stream(0.0, times, list(range(1, 8)))])
    assert window.slow_steps == [(4, 300.0)]


def test_what_comes_after_the_profiler_is_not_in_the_window():
    slow = stream(1.0, 0.1, 11)
    slow.times += [9.0, 10.0]
    slow.tokens += [12, 13]
    window = steady_window([slow], until=2.0)
    assert window.seconds == pytest.approx(1)
    assert window.mean_step_ms == pytest.approx(100)


def test_requests_that_never_decode_together_leave_the_longest_part():
    window = steady_window([stream(1.0, 0.1, 11), stream(5.0, 0.2, 11)])
    assert window.in_flight == 1
    assert window.step_ms == pytest.approx(200)


def test_no_second_token_is_an_error():
    with pytest.raises(ServerError, match="no steady decode"):
        steady_window([stream(1.0, 0.1, 1)])


def test_prompts_are_distinct_or_share_what_is_asked_for():
    prompts = random_prompts(4, 50, 5000, seed=1)
    assert all(len(prompt) == 50 and min(prompt) >= 1000 and max(prompt) < 5000 for prompt in prompts)
    assert len({tuple(prompt[:8]) for prompt in prompts}) == 4
    assert prompts == random_prompts(4, 50, 5000, seed=1)
    assert prompts != random_prompts(4, 50, 5000, seed=2)
    pairs = random_prompts(4, 50, 5000, seed=1, group=2, shared=30)
    assert pairs[0][:30] == pairs[1][:30] != pairs[2][:30] == pairs[3][:30]
    assert pairs[0][30:] != pairs[1][30:]
    assert {len(prompt) for prompt in pairs} == {50}


def test_ratios_compare_medians_and_the_largest_number_of_requests():
    def row(workload, server, rate, requests):
        return {"workload": workload, "server": server, "tokens_per_s": rate, "requests": requests}

    rows = [row("short", "ours", rate, 256) for rate in (90.0, 95.0, 400.0)] + [row("short", "bf16", 100.0, 256)]
    rows += [row("long", "ours", 50.0, 10), row("long", "ours", 180.0, 60), row("long", "bf16", 40.0, 10)]
    assert ratios(rows, {"ours": 600, "bf16": 100}) == {"short": 0.95, "long": 4.5, "capacity": 6.0}
    assert ratios(rows[:3], {"ours": 600}) == {}
    assert ratios([*rows, rows[-1] | {"group": 2}], {}) == {"short": 0.95}


def test_decode_lines_of_the_log():
    line = "Decode batch, #running-req: 10, #token: 5, token usage: 0.1, cuda graph: True, gen throughput (token/s): 460.50, #queue-req: 0"
    assert decode_log(f"Prefill batch, #running-req: 3\n[2026] {line}\n") == [(10, 460.5)]


def test_the_report_on_disk_is_complete_after_every_row(tmp_path):
    report = Report(tmp_path / "new" / "report.json")
    row = {"a": 1}
    report.add(row)
    row["b"] = 2
    report.put(after=3)
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["rows"] == [{"a": 1, "b": 2}]
    assert content["after"] == 3
    Report(None).add(row)


def test_a_report_goes_on_from_an_earlier_one_of_the_same_machine_only(tmp_path):
    path = tmp_path / "report.json"
    Report(path).add({"server": "ours"}, ours_before=1)
    Report(path, keep=True).add({"server": "bf16"})
    content = json.loads(path.read_text())
    assert [row["server"] for row in content["rows"]] == ["ours", "bf16"]
    assert content["ours_before"] == 1
    path.write_text(json.dumps({**content, "device": "another"}))
    with pytest.raises(ServerError, match="not comparable"):
        Report(path, keep=True)


@pytest.fixture
def server():
    """Streams `max_new_tokens` chunks a request, one every 10 ms; a first token id of 13 is an error. Gives its URL."""
    loop, ready, urls = asyncio.new_event_loop(), threading.Event(), []
    running = {"now": 0, "most": 0}

    async def generate(request):
        body = await request.json()
        running["now"] += 1
        running["most"] = max(running["most"], running["now"])
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        if body["input_ids"][0] == 13:
            await response.write(b'data: {"error": {"message": "unlucky"}}\n\n')
        else:
            count = body["sampling_params"]["max_new_tokens"]
            for token in [*range(1, count + 1), count]:
                meta = {"completion_tokens": token, "cached_tokens": 5}
                await response.write(f"data: {json.dumps({'text': 'x', 'meta_info': meta})}\n\n".encode())
                await asyncio.sleep(0.01)
        await response.write(b"data: [DONE]\n\n")
        running["now"] -= 1
        return response

    async def start():
        app = web.Application()
        app.router.add_post("/generate", generate)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        urls.append(f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}")
        ready.set()
        return runner

    def serve():
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=serve)
    thread.start()
    ready.wait(10)
    yield urls[0], running
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


def test_streams_are_recorded_and_the_callback_comes_once(server):
    url, running = server
    calls = []
    streams = Load(url, print).run([[1, 2], [3, 4], [5, 6]], 20, at_tokens=10, then=lambda: calls.append(1))
    assert [stream.tokens for stream in streams] == [list(range(1, 21))] * 3
    assert all(stream.cached_tokens == 5 for stream in streams)
    assert calls == [1]
    assert running["most"] == 3
    assert span(streams) > 0.19
    assert steady_window(streams).in_flight == 3


def test_no_more_than_the_asked_concurrency(server):
    url, running = server
    assert len(Load(url, print).run([[1]] * 6, 3, concurrency=2)) == 6
    assert running["most"] == 2


def test_an_error_in_the_stream_and_a_timeout_are_reported(server):
    url, _ = server
    with pytest.raises(ServerError, match="unlucky"):
        Load(url, print).run([[1], [13]], 5)
    with pytest.raises(ServerError, match="TimeoutError"):
        Load(url, print, timeout_s=0.1).run([[1]], 50)
    with pytest.raises(ServerError, match="failed"):
        Load("http://127.0.0.1:1", print).run([[1]], 5)
