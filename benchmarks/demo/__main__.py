"""`python -m benchmarks.demo`: the same agents against stock bf16 and against `--kv-quant oscar`, one server after the other."""

import argparse
import json
import signal
import sys
import time
from pathlib import Path

from benchmarks.demo import plot, quality, report
from benchmarks.demo.workload import replay
from benchmarks.servers import ServerError, SglangServer
from oscar_radix.model import ModelError, prepare

OUT = Path("build/demo")
COMMON_ARGS = ("--max-running-requests", "8", "--chunked-prefill-size", "512")


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    try:
        run(args)
    except (ServerError, ModelError, report.BudgetError, OSError) as error:
        print(f"demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo interrupted", file=sys.stderr)
        return 130
    return 0


def run(args: argparse.Namespace) -> None:
    """Both servers, then report.json, report.png and the table."""
    # Imported late: transformers takes seconds, and --help should not.
    from transformers import AutoTokenizer

    begun = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - begun:4.0f} s] {line}", flush=True)

    OUT.mkdir(parents=True, exist_ok=True)
    model = prepare(say)
    tokenizer = AutoTokenizer.from_pretrained(model)
    bytes_per_token = report.bf16_bytes_per_token(json.loads((model / "config.json").read_text()))
    budget = args.tokens * bytes_per_token
    workload = {"answer_tokens": args.answer_tokens, "temperature": args.temperature, "concurrency": args.concurrency, "progress": say}
    say(f"KV budget of both servers: {args.tokens} bf16 tokens, {budget} bytes")

    with _server(model, "bf16", args, [], say) as server:
        bf16 = replay(server, tokenizer, **workload)
        info = server.server_info()
        expected = quality.reference(server, quality.segments(bf16.conversations, args.continuation), say)
    version = info["version"]
    bf16_summary = report.server_summary(bf16, info, bytes_per_token)

    with _server(model, "oscar", args, ["--kv-quant", "oscar", *args.oscar_args], say) as server:
        oscar = replay(server, tokenizer, **workload, watch=server.kv_quant)
        kv_quant = oscar.rounds[-1]
        oscar_summary = report.server_summary(oscar, server.server_info(), kv_quant["bytes_per_token"])
        measured = quality.compare(server, expected, say)

    result = report.assemble(version, budget, bf16_summary, oscar_summary, kv_quant, measured)
    (OUT / "report.json").write_text(json.dumps(result, indent=2) + "\n")
    plot.draw(result, oscar.rounds, OUT / "report.png")
    print()
    print(report.table(result, measured, kv_quant["levels"]))
    print()
    say(f"wrote {OUT / 'report.json'} and {OUT / 'report.png'}")


def _server(model: Path, name: str, args: argparse.Namespace, extra: list[str], say) -> SglangServer:
    say(f"starting the {name} server; its log is {OUT / name}.log")
    arguments = ["--max-total-tokens", str(args.tokens), *COMMON_ARGS, *extra]
    return SglangServer(model, arguments, port=args.port, log_path=OUT / f"{name}.log", name=name, progress=say)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--tokens", type=int, default=5120, help="KV budget of both servers, in tokens of bf16 (%(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=40, help="longest answer of a turn (%(default)s)")
    # At temperature 0 so small a model repeats itself, which makes every next token easy to predict and the quality figure flattering.
    parser.add_argument("--temperature", type=float, default=0.7, help="temperature of the answers (%(default)s)")
    parser.add_argument("--concurrency", type=int, default=3, help="requests in flight (%(default)s)")
    parser.add_argument("--continuation", type=int, default=64, help="predictions compared after every prefix hit (%(default)s)")
    parser.add_argument("--port", type=int, help="port of the servers; a free one if left out")
    parser.add_argument("oscar_args", nargs="*", metavar="-- OSCAR ARGS", help="further flags of the second server")
    return parser


if __name__ == "__main__":
    sys.exit(main())
