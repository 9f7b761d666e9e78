"""How near a trained model is to its teacher, and how much it uses its new channels and key biases."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.key_bias_model.distil import POSITIONS, divergence
from benchmarks.key_bias_model.widen import attention_inputs, deviations, rotary_channels


@torch.inference_mode()
def held_out(student: Any, teacher: Any, ids: Tensor, sequence: int) -> dict[str, float]:
    """KL per token to the teacher and both perplexities over `ids` [tokens], in sequences of `sequence`."""
    kl, losses, positions = 0.0, {"student": 0.0, "teacher": 0.0}, 0
    for part in ids.split(sequence):
        states = {name: model.model(part[None], use_cache=False).last_hidden_state[0] for name, model in _named(student, teacher)}
        # The last position predicts a token that is not there.
        for start in range(0, len(part) - 1, POSITIONS):
            rows = slice(start, min(start + POSITIONS, len(part) - 1))
            following = part[rows.start + 1 : rows.stop + 1]
            logits = {name: model.lm_head(states[name][rows]).float() for name, model in _named(student, teacher)}
            kl += divergence(logits["student"], logits["teacher"]).item()
            for name, found in logits.items():
                losses[name] += torch.nn.functional.cross_entropy(found, following, reduction="sum").item()
            positions += len(following)
    perplexities = {f"{name}_perplexity": math.exp(loss / positions) for name, loss in losses.items()}
    return {"tokens": positions, "kl": kl / positions, **perplexities}


@torch.no_grad()
def without(student: Any, what: str) -> Any:
    """A copy of `student` without its `new queries` (so that scores do without the new channels), or without its `key biases`."""
    less = copy.deepcopy(student)
    head_dim = less.config.head_dim
    new = rotary_channels(head_dim // 2) + 1
    for layer in less.model.layers:
        if what == "key biases":
            layer.self_attn.k_proj.bias.zero_()
        else:
            for parameter in (layer.self_attn.q_proj.weight, layer.self_attn.q_proj.bias):
                parameter.unflatten(0, (-1, head_dim))[:, new.to(parameter.device)] = 0
    return less


def _named(student: Any, teacher: Any) -> tuple[tuple[str, Any], ...]:
    return ("student", student), ("teacher", teacher)


@torch.inference_mode()
def use_of_keys(student: Any, ids: Tensor) -> list[dict[str, float]]:
    """Per layer, over `ids` [tokens]: key biases in deviations of their head's keys, and the variance of keys that is in new channels.

    A head's deviation is the root mean square over its channels, before RoPE.
    """
    head_dim = student.config.head_dim
    old = rotary_channels(head_dim // 2).to(student.device)
    rows = []
    for layer, inputs in zip(student.model.layers, attention_inputs(student, ids), strict=True):
        projection = layer.self_attn.k_proj
        variance = deviations(projection.weight, inputs, head_dim).square()
        biases = projection.bias.float().view(-1, head_dim).abs() / variance.mean(-1, keepdim=True).sqrt()
        new = 1 - variance[:, old].sum() / variance.sum()
        found = {"bias_mean": biases.mean(), "bias_max": biases.max(), "new_key_variance": new}
        rows.append({name: value.item() for name, value in found.items()})
    return rows
