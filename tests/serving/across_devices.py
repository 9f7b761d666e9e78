"""The same prompts on our server on a CPU and on a GPU: log-probabilities of tokens that are decoded one by one.

    python -m tests.serving.across_devices record tests/serving/cpu_reference.json [--calibration FILE]
    python -m tests.serving.across_devices compare tests/serving/cpu_reference.json --model FOLDER [--calibration FILE]

`record` runs here, on the CPU path (plain torch, the specification); `compare` on a GPU host, which needs the embedded model's folder.
Each prompt is asked twice, so that the second time its prefix comes out of the cache. With the same calibration on both what differs is
arithmetic alone; without, each calibrates on its own in bfloat16, and other rotations round other rows.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.servers import SglangServer
from tests.serving.forcing import decode_forced

TOLERANCE = 0.12
"""Largest mean absolute difference of a token's log-probability with one calibration. Two runs of one server on a CPU differ by .03 to .06,
by batching."""
OWN_CALIBRATION_TOLERANCE = 0.2
"""The same where each calibrated on its own. Two CPU servers, one of them with a calibration of the same text by `oscar-radix calibrate`,
differ by .07 to .25, .15 on average; an H100 differed from the CPU by .066 to .128, .088 on average."""

CPU_FLAGS = ("--max-total-tokens", "1500", "--oscar-hot-fraction", "0.45")
GPU_FLAGS = ("--disable-overlap-schedule", "--sampling-backend", "pytorch", "--grammar-backend", "none", "--max-total-tokens", "20000")
FLAGS = ("--kv-quant", "oscar", "--chunked-prefill-size", "256", "--max-running-requests", "16", "--enable-custom-logit-processor")
FLAGS += ("--enable-cache-report",)


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
    """Write prompts and what the CPU path says to them."""
    from oscar_radix.model import prepare
    from tests.serving.quality import parts

    asked = [{"prompt": prompt, "forced": forced} for prompt, forced in parts()]
    with tempfile.TemporaryDirectory() as scratch, SglangServer(prepare(), (*FLAGS, *CPU_FLAGS, *calibration), name="reference") as server:
        answers = ask(server, asked, Path(scratch))
    for answer in answers:
        answer["log_probabilities"] = [round(value, 4) for value in answer["log_probabilities"]]
    path.write_text(json.dumps({"parts": asked, "answers": answers}) + "\n")


def compare(path: Path, model: Path, calibration: tuple[str, ...]) -> None:
    """Ask a GPU server the same; SystemExit where it differs by more than the tolerance on average."""
    reference = json.loads(path.read_text())
    flags = (*FLAGS, *GPU_FLAGS, *calibration)
    server = SglangServer(model, flags, name="gpu", threads=None, base_args=(), environment={"HF_HUB_OFFLINE": "1"})
    with tempfile.TemporaryDirectory() as scratch, server:
        answers = ask(server, reference["parts"], Path(scratch))
    worst = 0.0
    for ours, theirs in zip(answers, reference["answers"], strict=True):
        difference = np.abs(np.array(ours["log_probabilities"]) - np.array(theirs["log_probabilities"]))
        worst = max(worst, float(difference.mean()))
        print(f"{ours['turn']}: mean difference {difference.mean():.3f}, largest {difference.max():.3f}", flush=True)
        if ours["cached_tokens"] != theirs["cached_tokens"]:
            raise SystemExit(f"{ours['cached_tokens']} tokens came out of the cache, on the CPU {theirs['cached_tokens']}")
    tolerance = TOLERANCE if calibration else OWN_CALIBRATION_TOLERANCE
    if worst > tolerance:
        raise SystemExit(f"log-probabilities differ by {worst:.3f} on average, more than {tolerance}")
    print(f"within {tolerance}")


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", type=Path, help="folder of the embedded model, for compare")
    parser.add_argument("--calibration", type=Path, help="of --oscar-calibration, on both devices")
    args = parser.parse_args()
    calibration = ("--oscar-calibration", str(args.calibration.resolve())) if args.calibration else ()
    if args.what == "record":
        record(args.file, calibration)
    elif args.model is None:
        parser.error("compare needs --model")
    else:
        compare(args.file, args.model, calibration)


if __name__ == "__main__":
    main()
