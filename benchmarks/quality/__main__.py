"""KL, top-1 and perplexity of readers of a shared prefix, by recipe, policy, hot rows, window and bits: attention against its controls.

Usage: python -m benchmarks.quality [--quick | --full] [--model FOLDER] [--device DEVICE] [--out NAME]

A prefix is computed exactly. Some readers continue it through its 2-bit rows, and their attention, with that of the prefix's own last
64 queries, chooses hot rows; then *other* readers, teacher-forced, read the prefix as each cell keeps it, their own rows exact.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from benchmarks.quality import grid
from benchmarks.quality.measure import Fitted, measure
from benchmarks.quality.plot import draw
from benchmarks.quality.summary import comparisons, row_of, verdicts
from benchmarks.quality.texts import EVALUATED, GIVERS, shared_texts
from oscar_radix.calibration.builtin_text import builtin_text
from oscar_radix.calibration.collect import accumulate, load_model
from oscar_radix.model import prepare

RESULTS = Path(__file__).resolve().parents[1] / "results"
LENGTHS = [2048, 2048, 2048, 6144]
TAIL = 128


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder (Llama, Qwen2, Qwen3); the embedded model if left out")
    parser.add_argument("--device", default="cpu")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one prefix of 2,048 tokens, four cells: a minute")
    size.add_argument("--full", action="store_true", help="every recipe at every window, format and number of rows")
    parser.add_argument("--prefixes", type=int, nargs="+", help=f"their tokens ({LENGTHS})")
    parser.add_argument("--tail", type=int, default=TAIL, help="tokens of a reader (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU (%(default)s)")
    parser.add_argument("--out", type=Path, help="JSON to write, with a PNG beside it (benchmarks/results/quality-MODEL.json)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    begin = time.monotonic()

    def progress(line: str) -> None:
        print(f"{time.monotonic() - begin:6.0f} s  {line}", file=sys.stderr, flush=True)

    folder = args.model or prepare()
    model, tokenizer = load_model(folder, args.device)

    def tokenise(text: str) -> list[int]:
        return tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]

    moments = accumulate(model, tokenizer(builtin_text(), verbose=False)["input_ids"], progress).finish()
    first = tokenizer("", verbose=False)["input_ids"]
    cells = grid.quick_cells() if args.quick else grid.full_cells() if args.full else grid.default_cells()
    cells = list(dict.fromkeys(cells))
    fitted = {recipe: Fitted.of(recipe, moments, args.device) for recipe in dict.fromkeys(cell.recipe for cell in cells)}
    lengths = args.prefixes or (LENGTHS[:1] if args.quick else LENGTHS)
    out = args.out or (RESULTS / f"quality-{folder.name}{'-quick' if args.quick else ''}.json")
    head_dim = moments.geometry.head_dim
    measured = []
    for shared in shared_texts(tokenise, lengths, args.tail, first):
        measured.append(measure(model, fitted, shared, cells, progress))
        report = {
            "model": folder.name,
            "command": " ".join(["python -m benchmarks.quality", *(a for a in sys.argv[1:])]),
            "device": args.device,
            "prefixes": [m.prefix for m in measured],
            "readers": {"give mass": list(GIVERS), "evaluated": list(EVALUATED), "tokens": args.tail},
            "positions": sum(m.exact.kl[[kind != "quote" for kind in m.kinds]].numel() for m in measured),
        }
        report["table"] = [row_of(measured, cell, head_dim) for cell in cells]
        report["comparisons"] = comparisons(measured, cells)
        report["targets"] = verdicts(report["table"], report["comparisons"])
        report["seconds"] = round(time.monotonic() - begin)
        out.write_text(json.dumps(report, indent=1) + "\n")
        draw(report, out.with_suffix(".png"))
    for row in report["table"]:
        name = f"{row['recipe']} {row['policy']} {row['rows']} {row['row_format']} W{row['window']} {row['score']} {row['granularity']}"
        print(f"{name:75s} K{row['key_bits'] or '-'} {row['bits']:.3f} KL {row['kl']:.4f}+-{row['kl_error']:.4f} top-1 {row['top1']:.3f}"
              f" dNLL {row['dnll']:.4f} quoting {row['kl_quote']:.4f}")
    print("\n".join(report["targets"]))


if __name__ == "__main__":
    main()
