"""Which servers the whole-server benchmarks compare, their common options, and the report they write as they go."""

import argparse
import contextlib
import importlib.metadata
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.servers import CPU_ARGS, CPU_ENVIRONMENT, ServerError, SglangServer
from oscar_radix.policy import POLICIES

OURS = ("--kv-quant", "oscar")
HOST_GIB = "32"
HOT_ROWS = ("0.5", "2", "8")
MODES = {
    "ours": OURS,
    **{policy: (*OURS, "--oscar-policy", policy) for policy in POLICIES},
    **{f"attention-{rows}": (*OURS, "--oscar-policy", "attention", "--oscar-hot-rows", rows) for rows in HOT_ROWS},
    **{f"{policy}-host": (*OURS, "--oscar-policy", policy, "--oscar-host-gib", HOST_GIB) for policy in ("none", "attention")},
    "bf16": ("--attention-backend", "flashinfer", "--disable-prefill-cuda-graph"),
}
"""Flags of each kind of server: ours with its defaults, each policy, other numbers of hot rows, copies in host memory; stock."""
LOGS = Path("build/servers")
BEGUN = time.monotonic()


def say(line: str) -> None:
    """A progress line with the seconds since the start."""
    print(f"[{time.monotonic() - BEGUN:4.0f} s] {line}", flush=True)


def parser(doc: str, prog: str) -> argparse.ArgumentParser:
    """Options that both programs have."""
    result = argparse.ArgumentParser(prog=prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model-path", type=Path, required=True, help="Hugging Face folder; its config.json gives the vocabulary")
    result.add_argument("--load-format", default="auto", help="`dummy` for random weights (%(default)s)")
    result.add_argument("--mem-fraction-static", type=float, default=0.85, help="the same for every server (%(default)s)")
    result.add_argument("--prompt-tokens", type=int, default=31500, help="tokens of a long prompt (%(default)s)")
    result.add_argument("--new-tokens", type=int, default=200, help="tokens decoded in the measured window (%(default)s)")
    result.add_argument("--profile-steps", type=int, default=12, help="steps in the profile that follows; 0 for none (%(default)s)")
    result.add_argument("--activities", default="CPU,GPU", help="what the profiler records (%(default)s); GPU alone disturbs less")
    result.add_argument("--start-timeout", type=float, default=400, help="seconds a server may take to start (%(default)s)")
    result.add_argument("--timeout", type=float, default=400, help="seconds one load may take (%(default)s)")
    result.add_argument("--seed", type=int, default=1, help="of the random prompts (%(default)s)")
    result.add_argument("--cpu", action="store_true", help="serve on the CPU: a trial of this program, not a measurement")
    result.add_argument("--json", type=Path, help="report, rewritten after every measurement")
    result.add_argument("server_args", nargs="*", metavar="-- SERVER ARGS", help="further flags of every server")
    return result


def vocabulary(model: Path) -> int:
    """Tokens of the model's vocabulary."""
    return json.loads((model / "config.json").read_text())["vocab_size"]


@contextlib.contextmanager
def serving(mode: str, args: argparse.Namespace) -> Iterator[SglangServer]:
    """A server of MODES that has answered a first request; ended with all its processes whatever happens."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then, too
    log = LOGS / f"{mode}.log"
    flags = ["--load-format", args.load_format, "--mem-fraction-static", args.mem_fraction_static, "--random-seed", args.seed]
    settings: dict[str, Any] = {"base_args": (), "environment": {}, "threads": None}
    mode_flags = MODES[mode]
    if args.cpu:
        settings = {"base_args": CPU_ARGS, "environment": CPU_ENVIRONMENT}
        mode_flags = () if mode == "bf16" else mode_flags
    flags += [*mode_flags, *args.server_args]
    say(f"{mode}: starting, log {log}; flags {' '.join(map(str, flags))}")
    timeout = args.start_timeout
    with SglangServer(args.model_path, flags, log_path=log, name=mode, start_timeout_s=timeout, progress=say, **settings) as server:
        server.generate([1001, 1002, 1003], 4, ignore_eos=True, timeout_s=300)
        say(f"{mode}: answers")
        yield server
    say(f"{mode}: stopped")


def summary(server: SglangServer) -> dict[str, Any]:
    """What the server says of itself now: capacity, our report and integrity, retractions so far, its own last decode rates."""
    info = server.server_info()
    log = server.log_path.read_text(errors="replace")
    result = {
        "max_total_num_tokens": info["max_total_num_tokens"],
        "max_running_requests": info["internal_states"][0].get("effective_max_running_requests_per_dp", info.get("max_running_requests")),
        "retractions": log.count("Retract requests"),
        "decode_log": decode_log(log)[-16:],
    }
    if "kv_quant" in info["internal_states"][0]:
        result["kv_quant"] = for_the_record(info["internal_states"][0]["kv_quant"])
    return result


def for_the_record(kv_quant: dict[str, Any]) -> dict[str, Any]:
    """The server's report without its tree, which has a line a node, and with `~` for this machine's home folder."""
    calibration = kv_quant["calibration"].replace(str(Path.home()), "~")
    return {key: value for key, value in kv_quant.items() if key != "tree"} | {"calibration": calibration}


def decode_log(log: str) -> list[tuple[int, float]]:
    """(running requests, generated tokens/s) of each of SGLang's own decode lines, a cross-check of the client's figures."""
    found = re.findall(r"Decode batch.*?#running-req: (\d+).*?gen throughput \(token/s\): ([\d.]+)", log)
    return [(int(running), float(rate)) for running, rate in found]


class Report:
    """JSON that is complete after every `add`.

    Args:
        path: where it goes; None for nowhere.
        keep: go on from what is there, for servers measured by several calls on one machine; a file of another device or of other
            versions is refused.

    Raises:
        ServerError: such a file.
    """

    def __init__(self, path: Path | None, keep: bool = False) -> None:
        self.path = path
        self.content: dict[str, Any] = {"command": _command(), "device": _device(), "versions": _versions(), "rows": []}
        if keep and path and path.exists():
            before = json.loads(path.read_text())
            if any(before[key] != self.content[key] for key in ("device", "versions")):
                raise ServerError(f"{path} is of {before['device']}, {before['versions']}: not comparable with this machine")
            self.content = {**before, "command": f"{before['command']}; {self.content['command']}"}

    def add(self, row: dict[str, Any], **extra: Any) -> None:
        """A measurement; `extra` are keys of the report beside its rows."""
        self.content["rows"].append(row)
        self.put(**extra)

    def put(self, **extra: Any) -> None:
        """Set keys of the report and write it."""
        self.content.update(extra)
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1) + "\n")


def _command() -> str:
    """The command without the folders of this machine and without --json."""
    words = list(sys.argv[1:])
    if "--json" in words:
        del words[words.index("--json") : words.index("--json") + 2]
    if "--model-path" in words:
        place = words.index("--model-path") + 1
        words[place] = Path(words[place]).name
    return " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *words])


def _device() -> str:
    """Name of the GPU without touching it: a context of our own would take memory from the server."""
    if not shutil.which("nvidia-smi"):
        return "CPU"
    names = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=60)
    return names.stdout.strip().replace("\n", ", ") or "CPU"


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("sglang", "torch", "triton", "flashinfer-python"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
