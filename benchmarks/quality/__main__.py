"""KL, top-1 and perplexity of readers of a shared prefix, by recipe, policy, hot rows, window and bits: attention against its controls.

Usage: python -m benchmarks.quality [--quick | --full] [--model FOLDER] [--device DEVICE] [--out NAME]

A prefix is computed exactly. Some readers continue it through its 2-bit rows, and their attention, with that of the prefix's own last
64 queries, chooses hot rows; then *other* readers, teacher-forced, read the prefix as each cell keeps it, their own rows exact.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality import grid
from benchmarks.quality.measure import Fitted, measure
from benchmarks.quality.plot import draw
from benchmarks.quality.recall import shared_tasks
from benchmarks.quality.summary import by_length, lines, recall_report
from benchmarks.quality.texts import shared_texts
from oscar_radix.calibration.builtin_text import builtin_text
from oscar_radix.calibration.collect import accumulate, load_model
from oscar_radix.calibration.sequences import SEQUENCE_TOKENS
from oscar_radix.model import prepare

RESULTS = Path(__file__).resolve().parents[1] / "results"
LENGTHS = [2048, 2048, 2048, 6144]
TAIL = 128
PARTS = ["text", "search", "recall"]
"""search: scores, granularities, recipes and windows, on the first prefix."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder (Llama, Qwen2, Qwen3); the embedded model if left out")
    parser.add_argument("--device", default="cpu")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one prefix of 2,048 tokens, four cells: a minute")
    size.add_argument("--full", action="store_true", help="every recipe at every window, format and number of rows")
    parser.add_argument("--prefixes", type=int, nargs="+", help=f"their tokens ({LENGTHS})")
    parser.add_argument("--tail", type=int, default=TAIL, help="tokens of a reader (%(default)s)")
    parser.add_argument("--calibration-sequence", type=int, default=SEQUENCE_TOKENS, help="tokens of its sequences (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU (%(default)s)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None, help="what to measure; a file that exists keeps the rest")
    parser.add_argument("--out", type=Path, help="JSON to write, with a PNG beside it (benchmarks/results/quality-MODEL.json)")
    return parser.parse_args()


def finite(value: Any) -> Any:
    """`value` with None for numbers that JSON does not know: errors over a single reader."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main() -> None:
    args = arguments()
    parts = args.parts or (PARTS[:1] if args.quick else PARTS)
    torch.set_num_threads(args.threads)
    begin = time.monotonic()

    def progress(line: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {line}", file=sys.stderr, flush=True)

    folder = args.model or prepare()
    # Not bf16, whose rounding would add to every KL.
    model, tokenizer = load_model(folder, args.device, torch.float32)

    def tokenise(text: str) -> list[int]:
        return tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]

    ids = tokenizer(builtin_text(), verbose=False)["input_ids"]
    moments = accumulate(model, ids, progress, sequence_tokens=args.calibration_sequence).finish()
    first = tokenizer("", verbose=False)["input_ids"]
    of_size = grid.quick_cells() if args.quick else grid.full_cells() if args.full else grid.default_cells()
    fitted = {recipe: Fitted.of(recipe, moments, args.device) for recipe in grid.MEASURED}
    lengths = args.prefixes or (LENGTHS[:1] if args.quick else LENGTHS)
    out = args.out or (RESULTS / f"quality-{folder.name}{'-quick' if args.quick else ''}.json")
    report = json.loads(out.read_text()) if out.exists() else {}
    report = {**report, "model": folder.name, "head_dim": moments.geometry.head_dim}
    report["refined_layers"] = list(fitted["tck"].codec.refined)
    command = " ".join(["python -m benchmarks.quality", *sys.argv[1:]])
    for part in parts:
        if part == "recall":
            shares, cells = shared_tasks(tokenise, first), grid.recall_cells()
        else:
            chosen = lengths if part == "text" else lengths[:1]
            shares = shared_texts(tokenise, chosen, args.tail, first)
            cells = of_size if part == "text" else grid.search_cells() + grid.breadth_cells()
        measured = []
        for shared in shares:
            measured.append(measure(model, fitted, shared, list(dict.fromkeys(cells)), progress))
            summary = (recall_report if part == "recall" else by_length)(measured, cells, moments.geometry)
            made = {"command": command, "device": args.device, "calibration_sequence": args.calibration_sequence}
            report[part] = {**made, "seconds": round(time.monotonic() - begin), **summary}
            out.write_text(json.dumps(finite(report), indent=1, allow_nan=False) + "\n")
            if part == "text":
                draw(report, out.with_suffix(".png"))
        print("\n".join(lines(report[part])))


if __name__ == "__main__":
    main()
