"""Tokens a second of the whole server, ours against bf16 with FlashInfer, one after the other on the same machine and the same memory.

    python -m benchmarks.throughput --model-path M --load-format dummy [--json OUT] [-- SERVER ARGS]

short  no sharing: prompts of 1,024 random tokens, 128 new ones, 32 at a time; output tokens/s from the first request sent to the last
       token, prefill included. Target: 0.97 of bf16.
long   prompts of 31,500 random tokens, as many as each server is given (ours six times bf16's); output tokens/s while all of them decode,
       prefill not included. Target: 4.5 times bf16. Several counts after one another (`--ours-requests 10,60`) use the same prompts, so
       later ones hit the cache. With --group and --shared-prefix neighbours share a prefix, on both servers; the ratio says so.

A profile of some decode steps follows every long run, outside its window; see benchmarks/step.py.
"""

import argparse
import statistics
import sys
from typing import Any

from benchmarks.gpu_servers import Report, parser, say, serving, summary, vocabulary
from benchmarks.server_load import Load, random_prompts, span
from benchmarks.servers import ServerError, SglangServer
from benchmarks.step import decode_run, warm_up

TARGETS = {"short": 0.97, "long": 4.5, "capacity": 6.0}
STRUCTURE = {"short": ("requests", "prompt_tokens", "new_tokens", "concurrency"), "long": ("prompt_tokens", "group", "shared_prefix")}
"""What must be the same of all runs of a workload before they are compared."""


def short_run(server: SglangServer, args: argparse.Namespace, repeat: int) -> dict[str, Any]:
    """One run of the short workload on an empty cache, prompts that no earlier run had."""
    server.flush_cache()
    prompts = random_prompts(args.short_requests, args.short_prompt, vocabulary(args.model_path), args.seed + 10 + repeat)
    streams = Load(server.url, say, args.timeout).run(prompts, args.short_new, concurrency=args.concurrency)
    seconds = span(streams)
    row = {"workload": "short", "server": server.name, "requests": len(prompts), "prompt_tokens": args.short_prompt}
    row |= {"new_tokens": args.short_new, "concurrency": args.concurrency, "seconds": seconds}
    row["cached_tokens"] = sum(stream.cached_tokens for stream in streams)
    row["tokens_per_s"] = args.short_new * len(prompts) / seconds
    row["first_token_s"] = statistics.median(stream.times[0] - stream.sent for stream in streams)
    row["ms_a_token"] = statistics.median((s.times[-1] - s.times[0]) / (s.tokens[-1] - s.tokens[0]) * 1e3 for s in streams)
    say(
        f"  {server.name}: short, {row['tokens_per_s']:.0f} tokens/s ({seconds:.2f} s); median first token {row['first_token_s']:.3f} s, "
        f"then {row['ms_a_token']:.2f} ms a token"
    )
    return row


def run(mode: str, counts: list[int], args: argparse.Namespace, report: Report) -> None:
    """Both workloads on one server, short first: it starts from an empty cache."""
    with serving(mode, args) as server:
        before = summary(server)
        report.put(**{f"{mode}_before": before})
        say(f"{mode}: max_total_num_tokens {before['max_total_num_tokens']}")
        warm_up(server, max(*counts, args.concurrency), args.prompt_tokens, args)
        if args.short_repeats:
            short_run(server, args, args.short_repeats)  # not reported: kernels compile in it
        for repeat in range(args.short_repeats):
            report.add(short_run(server, args, repeat))
        server.flush_cache()
        words = vocabulary(args.model_path)
        prompts = random_prompts(max(counts), args.prompt_tokens, words, args.seed, args.group, args.shared_prefix)
        for count in counts:
            decode_run(server, prompts[:count], args, report, workload="long", group=args.group, shared_prefix=args.shared_prefix)
        after = summary(server)
        report.put(**{f"{mode}_after": after})
        integrity = f"; kv_quant integrity {after['kv_quant']['integrity']}" if "kv_quant" in after else ""
        say(f"{mode}: {after['retractions']} retractions; its own decode lines (running, tokens/s): {after['decode_log']}{integrity}")


def ratios(rows: list[dict[str, Any]], capacities: dict[str, int]) -> dict[str, float]:
    """Ours over bf16, where both were measured on prompts of the same structure: medians of the short runs, the runs of the most long
    requests, and tokens of capacity.

    Args:
        rows: of the report.
        capacities: `max_total_num_tokens` by server.
    """
    found: dict[str, dict[str, float]] = {"short": {}, "long": {}, "capacity": dict(capacities)}
    structures: dict[str, set[tuple]] = {name: set() for name in found}
    for row in rows:
        structures[row["workload"]].add(tuple(row.get(key) for key in STRUCTURE[row["workload"]]))
    for server in ("ours", "bf16"):
        mine = [row for row in rows if row["server"] == server]
        short = [row["tokens_per_s"] for row in mine if row["workload"] == "short"]
        long = [row for row in mine if row["workload"] == "long"]
        if short:
            found["short"][server] = statistics.median(short)
        if long:
            found["long"][server] = max(long, key=lambda row: row["requests"])["tokens_per_s"]
    comparable = {name: values for name, values in found.items() if len(values) == 2 and len(structures[name]) < 2}
    return {name: values["ours"] / values["bf16"] for name, values in comparable.items()}


def main() -> int:
    """Measure, print, and write where --json says; one server's failure leaves the other's figures."""
    options = parser(__doc__, "python -m benchmarks.throughput")
    options.add_argument("--servers", default="ours,bf16", help="which, in this order (%(default)s)")
    options.add_argument("--ours-requests", default="10,60", help="counts of long requests for ours; empty for none (%(default)s)")
    options.add_argument("--bf16-requests", default="10", help="the same for bf16 (%(default)s)")
    options.add_argument("--group", type=int, default=1, help="neighbouring long prompts that share a prefix (%(default)s: none)")
    options.add_argument("--shared-prefix", type=int, default=0, help="tokens that such a group shares (%(default)s)")
    options.add_argument("--short-repeats", type=int, default=2, help="runs of the short workload; 0 for none (%(default)s)")
    options.add_argument("--short-requests", type=int, default=256, help="%(default)s")
    options.add_argument("--short-prompt", type=int, default=1024, help="%(default)s")
    options.add_argument("--short-new", type=int, default=128, help="%(default)s")
    options.add_argument("--concurrency", type=int, default=32, help="short requests at a time (%(default)s)")
    options.add_argument("--keep", action="store_true", help="add to the --json file of an earlier call on this machine, for the ratios")
    args = options.parse_args()
    try:
        report, failed = Report(args.json, args.keep), 0
    except ServerError as error:
        options.error(str(error))
    for mode in args.servers.split(","):
        counts = [int(count) for count in getattr(args, f"{mode}_requests").split(",") if count]
        try:
            run(mode, counts, args, report)
        except ServerError as error:
            failed = 1
            report.put(**{f"{mode}_error": str(error)[:3000]})
            print(f"{mode} failed: {error}", file=sys.stderr, flush=True)
    states = {mode: report.content.get(f"{mode}_before") for mode in ("ours", "bf16")}
    capacities = {mode: state["max_total_num_tokens"] for mode, state in states.items() if state}
    result = ratios(report.content["rows"], capacities)
    report.put(ratios=result)
    sharing = f", groups of {args.group} share {args.shared_prefix} tokens" if args.group > 1 else ", all prompts distinct"
    for name, ratio in result.items():
        say(f"{name}: ours / bf16 = {ratio:.3f}, target {TARGETS[name]}{sharing if name == 'long' else ''}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
