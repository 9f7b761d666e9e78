"""Calibration ahead of time: run a Hugging Face model over a text and fit a recipe on what its attention saw."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oscar_radix.calibration.builtin_text import builtin_text
from oscar_radix.calibration.file import save_calibration
from oscar_radix.calibration.fingerprint import model_fingerprint, text_fingerprint
from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.calibration.predicted import fit
from oscar_radix.calibration.sequences import SEQUENCE_TOKENS, placed_sequences
from oscar_radix.calibration.transformers_attention import causal_attention, geometry_of, replaced_attention
from oscar_radix.codec import DEFAULT_RECIPE, Calibration, CalibrationError, Moments, get_recipe

Progress = Callable[[str], None]


def load_model(model_dir: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> tuple[Any, Any]:
    """(model, tokenizer) from a local folder, no network; `dtype` if not given: float32 on a CPU, bfloat16 elsewhere."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dtype = dtype or (torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(str(model_dir), local_files_only=True, dtype=dtype)
    except (OSError, ValueError) as error:
        raise CalibrationError(f"the model in {model_dir} cannot be loaded: {error}") from error
    return model.to(device).eval(), tokenizer


def accumulate(
    model: Any,
    token_ids: list[int],
    progress: Progress | None = None,
    key_bias: Tensor | None = None,
    sequence_tokens: int = SEQUENCE_TOKENS,
) -> MomentAccumulator:
    """Moments of a loaded model over `placed_sequences` of `token_ids`.

    key_bias [L, H, D] is added to every key first, as a model with a strong K bias would; attention does not change.
    """
    accumulator = MomentAccumulator(geometry_of(model.config))

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        accumulator.add(layer, q, k if key_bias is None else k + key_bias[layer], v, scale)
        return causal_attention(q, k, v, scale)

    sequences = placed_sequences(token_ids, model.config.get_text_config().max_position_embeddings, sequence_tokens)
    with replaced_attention(model, attention), torch.inference_mode():
        for number, (sequence, place) in enumerate(sequences, 1):
            ids = torch.tensor([sequence], device=model.device)
            positions = place + torch.arange(ids.shape[1], device=model.device)
            model.base_model(input_ids=ids, position_ids=positions[None], use_cache=False)
            if progress:
                progress(f"calibration: {accumulator.tokens} tokens, sequence {number} of {len(sequences)}")
    return accumulator


def collect_moments(
    model_dir: Path | str, text: str, max_tokens: int, device: torch.device | str = "cpu", progress: Progress | None = None
) -> Moments:
    """Moments of the model in `model_dir` over the first `max_tokens` tokens of `text`; CalibrationError when these are too few."""
    model, tokenizer = load_model(model_dir, device)
    return accumulate(model, tokenizer(text, verbose=False)["input_ids"][:max_tokens], progress).finish()


def calibrate(
    model_dir: Path | str,
    text: str | None,
    recipe: str | None,
    out: Path | str,
    max_tokens: int = 16384,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
) -> Calibration:
    """Measure, fit and write a calibration file; returns what was written. No text: the built-in one. No recipe: the default."""
    chosen = get_recipe(recipe or DEFAULT_RECIPE)
    text = builtin_text() if text is None else text
    moments = collect_moments(model_dir, text, max_tokens, device, progress)
    calibration = replace(
        fit(chosen, moments),
        model_name=Path(model_dir).resolve().name,
        model_fingerprint=model_fingerprint(model_dir),
        text_hash=text_fingerprint(text),
    )
    save_calibration(out, calibration)
    return calibration
