"""What a precision policy costs the decode throughput of the whole server, and prefill, one policy after the other on the same machine.

    python -m benchmarks.policy_cost --model-path M --load-format dummy [--requests 10,60] [--json OUT] [-- SERVER ARGS]

Two things differ between policies. The int8 rows that they keep are read by every step, which is what precision costs. And `attention`
does work of its own: every 64th decode step adds up attention mass, every 64th forward sums it, and levels are decided by it. That work
comes in single steps, 64 apart, so it shows as what such a step takes beyond the median one, over 64 steps: the median over its
repetitions, so that what happens once does not count, be it the machine's or the first decision after prompts were read. Target: 1.5 %.
"""

import statistics
import sys
from typing import Any

from benchmarks.gpu_servers import Report, parser, say, serving, summary, vocabulary
from benchmarks.server_load import Load, random_prompts, span
from benchmarks.servers import ServerError
from benchmarks.step import decode_run, warm_up
from oscar_radix.config import OscarConfig

TARGET = 0.015
INTERVAL = OscarConfig.policy_interval
"""Steps from one decision to the next."""


def run(policy: str, counts: list[int], args: Any, report: Report) -> None:
    """A server under `policy`: prompts are prefilled, then asked again, so that they decode together; once for each count."""
    with serving(policy, args) as server:
        before = summary(server)
        say(f"{policy}: max_total_num_tokens {before['max_total_num_tokens']}")
        warm_up(server, max(counts), args.prompt_tokens, args)
        prompts = random_prompts(max(counts), args.prompt_tokens, vocabulary(args.model_path), args.seed)
        for done, count in zip([0, *counts], counts, strict=False):
            streams = Load(server.url, say, args.timeout).run(prompts[done:count], 1)
            prefill = (count - done) * args.prompt_tokens / span(streams)
            row = decode_run(server, prompts[:count], args, report, policy=policy, prefill_tokens_per_s=prefill)
            state = summary(server)["kv_quant"]
            row |= {"levels": state["levels"], "effective_bits": state["effective_bits"], "integrity": state["integrity"]}
            row["mass_bytes_share"] = state["allocated_bytes"].get("mass", 0) / state["kv_budget_bytes"]
            report.put()
            share = f"{100 * row['mass_bytes_share']:.2f} % of the KV bytes"
            say(f"  {policy}: prefill {prefill:.0f} tokens/s, integrity {state['integrity']}, mass takes {share}")


def work(row: dict[str, Any]) -> float:
    """Share of the time that steps take which are slow again and again, INTERVAL apart, beyond the median step."""
    turns = int(row["seconds"] * 1e3 / row["mean_step_ms"]) // INTERVAL
    beyond = 0.0
    for phase in range(INTERVAL):
        excess = [step_ms - row["step_ms"] for token, step_ms in row["slow_steps"] if token % INTERVAL == phase]
        beyond += statistics.median([*excess, *[0.0] * max(turns - len(excess), 1)])
    return beyond / (INTERVAL * row["step_ms"])


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each policy and count of requests: throughput over that of `none`, and the share of its own work."""
    result = []
    for row in rows:
        plain = [other for other in rows if other["policy"] == "none" and other["requests"] == row["requests"]]
        if plain and row["policy"] != "none":
            speed = row["tokens_per_s"] / statistics.median(other["tokens_per_s"] for other in plain)
            result.append({"policy": row["policy"], "requests": row["requests"], "throughput": speed, "work": work(row)})
    return result


def main() -> int:
    """Measure, print, and write where --json says."""
    options = parser(__doc__, "python -m benchmarks.policy_cost")
    policies = "in this order (%(default)s); also attention-0.5, attention-2, attention-8, attention-host, none-host"
    options.add_argument("--policies", default="none,attention,random", help=policies)
    options.add_argument("--requests", default="10,60", help="ascending counts of prompts that decode together (%(default)s)")
    args = options.parse_args()
    args.profile_steps = 0
    report, failed = Report(args.json), 0
    for policy in args.policies.split(","):
        try:
            run(policy, [int(count) for count in args.requests.split(",")], args, report)
        except ServerError as error:
            failed = 1
            report.put(**{f"{policy}_error": str(error)[:3000]})
            print(f"{policy} failed: {error}", file=sys.stderr, flush=True)
    found = verdicts(report.content["rows"])
    report.put(verdicts=found)
    for each in found:
        say(
            f"{each['policy']}, {each['requests']} requests: {each['throughput']:.3f} of the throughput of `none`; "
            f"its work in single steps takes {100 * each['work']:.2f} % (target for attention: {100 * TARGET} %)"
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
