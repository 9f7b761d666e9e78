"""The same prompts on our server on a CPU and on another device or with other flags: log-probabilities of tokens decoded one by one.

    python -m tests.serving.across_devices record tests/serving/cpu_reference.json --calibration FILE
    python -m tests.serving.across_devices compare tests/serving/cpu_reference.json --model FOLDER [--calibration FILE] [-- SERVER ARGS]

`record` runs here: on stock SGLang in bf16 and on the CPU path (plain torch, the specification). `compare` runs on a GPU host, which needs
the embedded model's folder; tensor parallelism, say, is `-- --tp-size 3`. Each prompt is asked twice, so that the second time its prefix
comes out of the cache. With the same calibration on both what differs is arithmetic alone; without, each calibrates on its own in
bfloat16, and other rotations round other rows.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.servers import SglangServer
from tests.serving.forcing import decode_forced

TOLERANCE = 0.1
"""Largest mean absolute difference of a token's log-probability, over all answers, with one calibration on both. Two runs of one server on
a CPU differ by .03 to .06, by batching alone: whatever rounds a row of the cache differently may decide a 2-bit code. An H100 differed by
.072."""
OWN_CALIBRATION_TOLERANCE = 0.2
"""The same where each calibrated on its own. Two CPU servers, one of them with a calibration of the same text by `oscar-radix calibrate`,
differ by .15; an H100 differed from the CPU by .088."""
ALLOWED_ERROR = 1.15
"""Largest mean absolute difference from bf16's log-probabilities, in those of the CPU path."""

CPU_FLAGS = ("--max-total-tokens", "1500", "--oscar-hot-fraction", "0.45")
GPU_FLAGS = ("--disable-overlap-schedule", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--max-total-tokens", "20000")
COMMON_FLAGS = ("--chunked-prefill-size", "256", "--max-running-requests", "16", "--enable-custom-logit-processor", "--enable-cache-report")
FLAGS = (*COMMON_FLAGS, "--kv-quant", "oscar")


def ask(server: SglangServer, parts: list[dict], scratch: Path) -> list[dict]:
    """Cached tokens and log-probabilities of each part, asked twice."""
    answers = []
    for part in parts:
        for turn in ("miss", "hit"):
            meta, log_p = decode_forced(server, part["prompt"], part["forced"], scratch / "forced")
            answers.append({"turn": turn, "cached_tokens": meta["cached_tokens"], "log_probabilities": log_p.tolist()})
            print(f"{turn}: {len(part['prompt'])} tokens, {meta['cached_tokens']} cached, mean {log_p.mean():.3f}", flush=True)
    return answers


def record(path: Path, calibration: tuple[str, ...]) -> None:
    """Write prompts, and what bf16 and the CPU path say to them."""
    from oscar_radix.model import prepare
    from tests.serving.quality import parts

    asked = [{"prompt": prompt, "forced": forced} for prompt, forced in parts()]
    with tempfile.TemporaryDirectory() as scratch:
        with SglangServer(prepare(), (*COMMON_FLAGS, "--max-total-tokens", "4096"), name="bf16") as server:
            exact = ask(server, asked, Path(scratch))
        with SglangServer(prepare(), (*FLAGS, *CPU_FLAGS, *calibration), name="reference") as server:
            answers = ask(server, asked, Path(scratch))
    for answer in (*exact, *answers):
        answer["log_probabilities"] = [round(value, 4) for value in answer["log_probabilities"]]
    path.write_text(json.dumps({"parts": asked, "bf16": exact, "answers": answers}) + "\n")


def check(answers: list[dict], reference: dict[str, Any], tolerance: float, same_hits: bool = True) -> str:
    """Compare answers to the first parts of a reference, and to the first positions of each.

    Args:
        answers: of `ask`.
        reference: what `record` wrote.
        tolerance: largest mean difference from the CPU path's log-probabilities.
        same_hits: whether as many tokens must have come out of the cache.

    Returns:
        A line with both means.

    Raises:
        ValueError: what differs, and by how much.
    """
    pairs = list(zip(answers, reference["answers"], reference["bf16"], strict=False))
    apart, error, allowed = [], [], []
    for ours, theirs, exact in pairs:
        asked = len(ours["log_probabilities"])
        mine, cpu, bf16 = (np.array(answer["log_probabilities"])[:asked] for answer in (ours, theirs, exact))
        apart.append(np.abs(mine - cpu))
        error.append(np.abs(mine - bf16))
        allowed.append(np.abs(cpu - bf16))
        print(f"{ours['turn']}: mean difference {apart[-1].mean():.3f}, largest {apart[-1].max():.3f}", flush=True)
        if same_hits and ours["cached_tokens"] != theirs["cached_tokens"]:
            raise ValueError(f"{ours['cached_tokens']} tokens came out of the cache, on the CPU {theirs['cached_tokens']}")
    line = (
        f"log-probabilities differ by {np.mean(apart):.3f} on average from the CPU path's (tolerance {tolerance}), and by "
        f"{np.mean(error):.3f} from bf16's, from which the CPU path differs by {np.mean(allowed):.3f}"
    )
    if np.mean(apart) > tolerance or np.mean(error) > ALLOWED_ERROR * np.mean(allowed):
        raise ValueError(line)
    return line


def compare(path: Path, model: Path, calibration: tuple[str, ...], server_args: list[str]) -> None:
    """Ask a GPU server the same; SystemExit where it differs by more than the tolerance on average."""
    reference = json.loads(path.read_text())
    flags = (*FLAGS, *GPU_FLAGS, *calibration, *server_args)
    server = SglangServer(model, flags, name="gpu", threads=None, base_args=(), environment={"HF_HUB_OFFLINE": "1"})
    with tempfile.TemporaryDirectory() as scratch, server:
        answers = ask(server, reference["parts"], Path(scratch))
        integrity = server.kv_quant()["integrity"]
    try:
        print(check(answers, reference, TOLERANCE if calibration else OWN_CALIBRATION_TOLERANCE))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if integrity != "ok":
        raise SystemExit(integrity)


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", type=Path, help="folder of the embedded model, for compare")
    parser.add_argument("--calibration", type=Path, help="of --oscar-calibration, on both devices")
    parser.add_argument("server_args", nargs="*", metavar="-- SERVER ARGS", help="further flags of the server that is compared")
    args = parser.parse_args()
    calibration = ("--oscar-calibration", str(args.calibration.resolve())) if args.calibration else ()
    if args.what == "record":
        record(args.file, calibration)
    elif args.model is None:
        parser.error("compare needs --model")
    else:
        compare(args.file, args.model, calibration, args.server_args)


if __name__ == "__main__":
    main()
