"""A whole decode step of the server at long context: how long it takes, and where the time goes.

    python -m benchmarks.step --server ours --model-path M --load-format dummy [--json OUT] [-- SERVER ARGS]

One server. First pass: N distinct random prompts, one new token each; gives prefill tokens/s, from the first request sent to the last
token, and fills the cache. Second pass: the same prompts, which hit the cache, and decode together. Milliseconds a step and tokens/s are
measured by the client while all N decode (benchmarks/server_load.py). Then torch's profiler records some more steps of the same requests,
and the table shows microseconds a step by group of kernels (benchmarks/trace.py). The profiler runs after the measured window, not in it.
"""

import argparse
import contextlib
import shutil
import sys
import time
from dataclasses import asdict
from typing import Any

import requests

from benchmarks import trace
from benchmarks.gpu_servers import LOGS, MODES, Report, parser, say, serving, summary, vocabulary
from benchmarks.server_load import Load, random_prompts, span, steady_window
from benchmarks.servers import ServerError, SglangServer

SPARE_TOKENS = 40
"""Tokens after the profiled steps, so that no request ends while the profiler runs."""
TRACE_TIMEOUT_S = 90.0


class Profile:
    """A profile of some steps of a running server; `start` returns when the profiler runs, `events` waits for its file."""

    def __init__(self, server: SglangServer, steps: int, activities: list[str]) -> None:
        self.server = server
        self.steps = steps
        self.activities = activities
        self.folder = (LOGS / f"{server.name}-trace").resolve()
        self.started_at = float("inf")
        self.problem = ""

    def start(self) -> None:
        """Ask the server to profile from its next step on; it stops by itself. A failure is kept in `problem`."""
        self.started_at = time.monotonic()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        body = {"output_dir": str(self.folder), "num_steps": self.steps, "activities": self.activities}
        body |= {"with_stack": False, "record_shapes": False}
        try:
            answer = requests.post(f"{self.server.url}/start_profile", json=body, timeout=120)
            if answer.status_code != 200:
                self.problem = f"/start_profile answered {answer.status_code}: {answer.text[:300]}"
        except requests.RequestException as error:
            self.problem = f"/start_profile: {error}"

    def events(self) -> list[dict[str, Any]]:
        """All events of the trace.

        Raises:
            ServerError: there is no readable trace.
        """
        if self.started_at == float("inf"):
            raise ServerError("no profile: the requests never all had the tokens to start it at")
        if self.problem:
            raise ServerError(f"no profile: {self.problem}")
        deadline, stopped = time.monotonic() + TRACE_TIMEOUT_S, False
        while time.monotonic() < deadline:
            for path in self.folder.glob("*.gz"):
                with contextlib.suppress(OSError, EOFError, ValueError):  # not all of it is written yet
                    return trace.read_events(path)
            if not stopped and time.monotonic() > deadline - TRACE_TIMEOUT_S + 15:
                stopped = True  # fewer steps came than were asked for
                with contextlib.suppress(requests.RequestException):
                    requests.post(f"{self.server.url}/stop_profile", timeout=60)
            time.sleep(0.5)
        raise ServerError(f"no profile: no trace in {self.folder} after {TRACE_TIMEOUT_S:.0f} s")


def warm_up(server: SglangServer, requests_at_once: int, longest: int, args: argparse.Namespace) -> None:
    """Let kernels compile before anything is measured: many short requests, one of more than a chunk; then empty the cache."""
    words = vocabulary(args.model_path)
    load = Load(server.url, say, args.timeout)
    load.run(random_prompts(requests_at_once, min(longest, 64), words, args.seed + 1000), 4)
    load.run(random_prompts(1, min(longest, 10000), words, args.seed + 1001), 4)
    server.flush_cache()
    say(f"{server.name}: warm")


def decode_run(server: SglangServer, prompts: list[list[int]], args: argparse.Namespace, report: Report, **row: Any) -> dict[str, Any]:
    """Decode all prompts together, measure the steady part, then profile; print both and add a row to the report as soon as it is known.

    Args:
        server: a running one.
        prompts: token ids.
        args: options of `gpu_servers.parser`.
        report: takes the row.
        row: keys that say what this run is.
    """
    profile = Profile(server, args.profile_steps, args.activities.split(","))
    profiled = args.profile_steps > 0
    total = args.new_tokens + (args.profile_steps + SPARE_TOKENS if profiled else 0)
    load = Load(server.url, say, args.timeout)
    say(f"  {server.name}: {len(prompts)} requests of {len(prompts[0])} tokens, {total} new tokens each")
    streams = load.run(prompts, total, at_tokens=args.new_tokens if profiled else None, then=profile.start if profiled else None)
    window = steady_window(streams, until=profile.started_at)
    first_tokens = max(stream.times[0] for stream in streams) - min(stream.sent for stream in streams)
    cached, prompt_tokens = sum(stream.cached_tokens for stream in streams), sum(map(len, prompts))
    row |= {"server": server.name, "requests": len(prompts), "prompt_tokens": len(prompts[0]), "cached_tokens": cached}
    row |= {"seconds_to_last_first_token": first_tokens, **asdict(window)}
    report.add(row)
    say(f"  {server.name}: {window.in_flight} of {len(prompts)} in flight for {window.seconds:.2f} s: {window.tokens_per_s:.0f} tokens/s")
    say(f"  {server.name}: {window.step_ms:.2f} ms a step (median; mean {window.mean_step_ms:.2f})")
    say(f"  {server.name}: {cached} of {prompt_tokens} prompt tokens cached, last first token after {first_tokens:.1f} s")
    if profiled:
        try:
            result = trace.breakdown(profile.events(), args.profile_steps)
        except ServerError as error:
            say(f"  {error}")
            row["profile"] = str(error)
        else:
            row["profile"] = asdict(result) if result else "the trace has no GPU events"
            print(trace.table(result, window.mean_step_ms) if result else f"  {row['profile']}", flush=True)
        report.put()
    return row


def run(args: argparse.Namespace, report: Report) -> None:
    """The two passes on one server."""
    with serving(args.server, args) as server:
        report.put(before=summary(server))
        say(f"max_total_num_tokens {report.content['before']['max_total_num_tokens']}")
        warm_up(server, args.requests, args.prompt_tokens, args)
        prompts = random_prompts(args.requests, args.prompt_tokens, vocabulary(args.model_path), args.seed)
        streams = Load(server.url, say, args.timeout).run(prompts, 1)
        seconds, tokens = span(streams), sum(map(len, prompts))
        report.put(prefill={"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds})
        say(f"prefill: {tokens} tokens in {seconds:.1f} s, {tokens / seconds:.0f} tokens/s")
        decode_run(server, prompts, args, report)
        after = summary(server)
        report.put(after=after)
        say(f"the server's own decode lines (running, tokens/s): {after['decode_log']}; {after['retractions']} retractions")
        if "kv_quant" in after:
            say(f"kv_quant: integrity {after['kv_quant']['integrity']}, levels {after['kv_quant']['levels']}")


def main() -> int:
    """Measure, print, and write where --json says."""
    options = parser(__doc__, "python -m benchmarks.step")
    options.add_argument("--server", choices=MODES, default="ours", help="%(default)s")
    options.add_argument("--requests", type=int, default=10, help="prompts that decode together (%(default)s)")
    args = options.parse_args()
    try:
        run(args, Report(args.json))
    except ServerError as error:
        print(f"step failed: {error}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
