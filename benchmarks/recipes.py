"""KL, top-1 agreement and bits of every recipe on held-out text: the table that the default recipe is chosen by.

Usage: .venv/bin/python -m benchmarks.recipes [--passages N] [--model FOLDER] [--calibration-text FILE] [--key-bias SIGMAS]

Passages are Python's own documentation and standard library sources, installed with every Python and no part of the calibration
text. The prefix is exact, then coded; the tail reads it, teacher-forced (`oscar_radix.calibration.evaluate`).
"""

import argparse
import inspect
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from oscar_radix.calibration.builtin_text import builtin_text
from oscar_radix.calibration.collect import accumulate, load_model
from oscar_radix.calibration.evaluate import prepare, quality, tail_log_probabilities
from oscar_radix.calibration.predicted import fit
from oscar_radix.codec import RECIPES
from oscar_radix.model import prepare as prepare_model

PREFIX, TAIL = 1024, 128


def held_out_texts(count: int) -> list[str]:
    """`count` texts, documentation and sources in turn; 20,000 characters each, more than PREFIX + TAIL tokens."""
    import asyncio.base_events
    import difflib
    import http.cookiejar
    import pickletools
    import pydoc_data.topics

    documentation = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    sources = [inspect.getsource(module) for module in (http.cookiejar, difflib, asyncio.base_events, pickletools)]
    size, texts = 20000, []
    for i in range(count):
        text = documentation if i % 2 == 0 else sources[i // 2 % len(sources)]
        start = (60000 + 65000 * (i // 2)) % max(len(text) - size, 1) if i % 2 == 0 else 5000
        texts.append(text[start : start + size])
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="Hugging Face folder; the embedded model if left out")
    parser.add_argument("--calibration-text", type=Path, help="UTF-8 text; the built-in text if left out")
    parser.add_argument("--passages", type=int, default=4, help="prefixes of 1,024 tokens with tails of 128 (%(default)s)")
    parser.add_argument("--key-bias", type=float, default=0.0, help="add a constant to every key, this many times their size (%(default)s)")
    parser.add_argument("--json", type=Path, help="also write the table here")
    args = parser.parse_args()

    model, tokenizer = load_model(args.model or prepare_model())
    text = args.calibration_text.read_text(encoding="utf-8") if args.calibration_text else builtin_text()
    moments = accumulate(model, tokenizer(text, verbose=False)["input_ids"], lambda line: print(line, file=sys.stderr)).finish()
    bias = None
    if args.key_bias:
        size = torch.diagonal(moments.key_covariance, dim1=-2, dim2=-1).mean(-1, keepdim=True).sqrt()
        signs = torch.randint(0, 2, moments.key_mean.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        bias = (args.key_bias * size * signs).float()
        moments = accumulate(model, tokenizer(text, verbose=False)["input_ids"], key_bias=bias).finish()
    ids = [tokenizer(passage, verbose=False)["input_ids"][: PREFIX + TAIL] for passage in held_out_texts(args.passages)]
    passages = [prepare(model, sequence, PREFIX) for sequence in ids]

    rows = []
    print(f"{'recipe':8s} {'bits':>6s} {'KL':>8s} {'+-SE':>8s} {'top-1':>7s} {'dNLL':>8s} {'K alone':>8s} {'V alone':>8s} {'int8':>8s}")
    for name, recipe in RECIPES.items():
        codec = recipe.codec(fit(recipe, moments), "cpu")

        def measure(key_bits: bool, value_bits: bool, codec=codec):
            return quality(passages, lambda p: tail_log_probabilities(model, p, codec, bias, key_bits, value_bits))

        both, keys, values, neither = (measure(*which) for which in ((True, True), (True, False), (False, True), (False, False)))
        bits = codec.layout.bits_per_element(codec.geometry.head_dim, len(codec.refined) / codec.geometry.layers)
        rows.append({"recipe": name, "bits": bits, **asdict(both), "kl_keys": keys.kl, "kl_values": values.kl, "kl_int8": neither.kl})
        print(
            f"{name:8s} {bits:6.3f} {both.kl:8.4f} {both.kl_error:8.4f} {both.top1:7.3f} {both.dnll:8.4f}"
            f" {keys.kl:8.4f} {values.kl:8.4f} {neither.kl:8.4f}",
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
