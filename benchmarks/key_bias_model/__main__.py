"""Make a trained model of head dim 128 with large key biases, for `python -m benchmarks.quality --model FOLDER`.

Usage: python -m benchmarks.key_bias_model --out FOLDER (--minutes M | --steps N) [--device cuda]

Models of this kind (Qwen2.5) come from a model hub only; this one is made from SmolLM2-135M-Instruct, of head dim 64 without biases:

1. A Qwen2 of SmolLM2's sizes and head dim 128 takes over its weights so that it computes the same function: RoPE pair j of 64 channels is
   pair 2j of 128, queries grow by sqrt(2) as the softmax scale falls.
2. Odd RoPE pairs take over half of what the pair before them does in the scores, with random projections added. New value channels
   get random projections of full deviation, read by nothing at first. Key biases are normal: in the 10 slowest of 64 RoPE pairs with ten
   times the deviation of the head's keys, as Qwen2.5 has them, elsewhere with once. Biases of q and v are zero. All is trainable.
3. It is distilled from SmolLM2 over sources and documents of the installed Python packages, without those that the benchmarks read: KL,
   AdamW, float32 weights, bfloat16 arithmetic. Every fourth batch has sequences four times as long as --sequence.

FOLDER gets the weights in bfloat16, the tokeniser and training.json.
"""

import argparse
import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.key_bias_model.corpus import Stream, installed_folders, training_files, training_texts
from benchmarks.key_bias_model.distil import LONG, Plan, distil
from benchmarks.key_bias_model.report import held_out, use_of_keys, without
from benchmarks.key_bias_model.widen import fill, widen
from benchmarks.quality.texts import prose
from oscar_radix.calibration.collect import load_model
from oscar_radix.model import prepare

COPIED_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
NOTICE = "Made from SmolLM2-135M-Instruct by Hugging Face, Apache License 2.0: heads widened, key biases added, distilled from it.\n"


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; must not be there or be empty")
    parser.add_argument("--device", default="cuda", help="%(default)s; cpu only for a few steps")
    parser.add_argument("--minutes", type=float, help="train for so long, the learning rate falling with the time")
    parser.add_argument("--steps", type=int, help="train so many steps")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens of a sequence (%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step (%(default)s); fewer take less GPU memory")
    parser.add_argument("--seed", type=int, default=0, help="of new weights, biases and the order of texts (%(default)s)")
    args = parser.parse_args(given)
    if (args.minutes is None) == (args.steps is None):
        parser.error("say how long to train: give either --minutes or --steps")
    for name in ("minutes", "steps", "batch"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name} must be above 0")
    if args.sequence < 2:
        parser.error("--sequence must be 2 or more: a position predicts the one after it")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: no CUDA device here; run on a GPU host, or try a few steps with --device cpu")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out} is there and not empty: delete it or give another --out")
    return args


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    folder = prepare()
    teacher, tokenizer = load_model(folder, args.device)
    context = teacher.config.max_position_embeddings
    if args.sequence > context:
        sys.exit(f"--sequence {args.sequence}: SmolLM2 reads {context} tokens at most; give fewer")

    def say(line: str) -> None:
        print(line, flush=True)

    def tokenise(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, verbose=False, add_special_tokens=False)["input_ids"]

    files = training_files(installed_folders(), args.seed)
    stream = Stream(lambda: training_texts(files), tokenise, tokenizer.eos_token_id)
    say(f"{len(files)} files to train on; long sequences are of {min(LONG * args.sequence, context)} tokens")
    student = widen(teacher)
    fill(student, stream.take(args.sequence).to(args.device), args.seed)
    trained = distil(student, teacher, stream, Plan(args.steps, args.minutes, args.sequence, args.batch), say)
    if args.device != "cpu":
        say(f"GPU memory: {torch.cuda.max_memory_allocated(args.device) / 1e9:.1f} GB at most")

    args.out.mkdir(parents=True, exist_ok=True)
    student.to(torch.bfloat16).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    for name in COPIED_FILES:
        shutil.copy(folder / name, args.out / name)
    (args.out / "NOTICE").write_text(NOTICE)
    # What is saved is what is measured, in float32 as `benchmarks.quality` reads it: bfloat16 sines are coarse for large biases.
    student, teacher = load_model(args.out, args.device, torch.float32)[0], teacher.float()
    essay = torch.tensor(tokenise([prose()])[0], device=args.device)
    quality, keys = held_out(student, teacher, essay, args.sequence), use_of_keys(student, essay)
    needed = {what: held_out(without(student, what), teacher, essay, args.sequence)["kl"] for what in ("new queries", "key biases")}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    report = {"arguments": given, "device": _device_name(args.device), **asdict(trained)}
    report |= {"held_out": quality, "kl_without": needed, "keys": keys}
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")

    say(f"{trained.steps} steps, {trained.tokens} tokens, {trained.seconds:.0f} s: KL {trained.first_kl:.4f} -> {trained.kl:.4f}")
    say(
        f"held-out prose, {quality['tokens']} tokens: KL {quality['kl']:.4f}, perplexity {quality['student_perplexity']:.3f},"
        f" teacher's {quality['teacher_perplexity']:.3f}"
    )
    say("KL " + ", ".join(f"without {what} {kl:.3f}" for what, kl in needed.items()))
    say("layer  |key bias| / deviation of keys: mean, max   variance of keys in new channels")
    for number, row in enumerate(keys):
        say(f"{number:5d}  {row['bias_mean']:38.2f} {row['bias_max']:6.1f} {row['new_key_variance']:34.1%}")
    say(f"written to {args.out}")


def _device_name(device: str) -> str:
    return device if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
