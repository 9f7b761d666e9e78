"""Distillation: the student's distribution of the next token is drawn to the teacher's at every position."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.key_bias_model.corpus import Stream

POSITIONS = 2048
"""Whose logits, of teacher and student, are there at once: .4 GB in float32 with SmolLM2's vocabulary."""
ATTENTION_RATE, OTHER_RATE = 5e-4, 1e-4
BETAS, DECAY, LARGEST_GRADIENT = (0.9, 0.95), 0.01, 1.0
WARM, FLOOR = 0.03, 0.1
"""Share of the training with a rising rate, and the rate at its begin and end, in peak rates."""
LONG, EVERY = 4, 4
"""Every fourth batch is of sequences four times as long, of the same number of tokens."""
LINE_STEPS = 20


@dataclass(frozen=True)
class Plan:
    """How long to train and on what; one of `steps` and `minutes` is None."""

    steps: int | None
    minutes: float | None
    sequence: int
    batch: int

    def done(self, steps: int, seconds: float) -> float:
        """Share of the training that is over."""
        return steps / self.steps if self.steps else seconds / (60 * self.minutes)

    def shape(self, step: int, context: int) -> tuple[int, int]:
        """(sequences, tokens of each) of a step, for a model that reads `context` positions."""
        if step % EVERY < EVERY - 1:
            return self.batch, self.sequence
        length = min(LONG * self.sequence, context)
        return max(1, self.batch * self.sequence // length), length


@dataclass(frozen=True)
class Trained:
    """What a training took; kl: mean over the last LINE_STEPS steps or fewer."""

    steps: int
    tokens: int
    seconds: float
    first_kl: float
    kl: float


def rate(done: float) -> float:
    """Learning rate in peak rates: linear warm-up, then cosine."""
    if done < WARM:
        return FLOOR + (1 - FLOOR) * done / WARM
    return FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * (done - WARM) / (1 - WARM))) / 2


def optimiser_of(student: Any) -> torch.optim.AdamW:
    """Attention learns faster than the rest, which begins as the teacher's; no decay of biases and norms."""
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in student.named_parameters():
        key = (ATTENTION_RATE if "self_attn" in name else OTHER_RATE, DECAY if parameter.ndim > 1 else 0.0)
        groups.setdefault(key, []).append(parameter)
    listed = [{"params": found, "lr": peak, "peak": peak, "weight_decay": decay} for (peak, decay), found in groups.items()]
    return torch.optim.AdamW(listed, betas=BETAS, fused=student.device.type == "cuda")


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student), summed over rows; logits [rows, vocabulary]."""
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True)


def backward(student: Any, teacher: Any, ids: Tensor) -> Tensor:
    """Add the gradient of the mean KL over all positions of `ids` [batch, tokens]; the KL.

    Logits are made, compared and differentiated POSITIONS at a time; then what that gave for the hidden states goes through the layers.
    """
    # On a CPU bfloat16 is slower, not faster.
    mixed = torch.autocast(ids.device.type, torch.bfloat16, enabled=ids.device.type == "cuda")
    with torch.no_grad():
        wanted = teacher.model(ids, use_cache=False).last_hidden_state.flatten(0, 1).split(POSITIONS)
    with mixed:
        hidden = student.model(ids, use_cache=False).last_hidden_state
    pieces = [piece.requires_grad_() for piece in hidden.detach().flatten(0, 1).split(POSITIONS)]
    total = torch.zeros((), device=ids.device)
    for piece, target in zip(pieces, wanted, strict=True):
        with torch.no_grad():
            logits = teacher.lm_head(target)
        with mixed:
            predicted = student.lm_head(piece)
        loss = divergence(predicted, logits) / ids.numel()
        loss.backward()
        total += loss.detach()
    hidden.backward(torch.cat([piece.grad for piece in pieces]).view_as(hidden))
    return total


def distil(student: Any, teacher: Any, stream: Stream, plan: Plan, progress: Callable[[str], None] = print) -> Trained:
    """Train `student`, float32, until `plan` is done."""
    optimiser, context = optimiser_of(student), student.config.max_position_embeddings
    student.train()
    step = tokens = 0
    first, recent = math.nan, []
    begin = time.monotonic()
    while (done := plan.done(step, time.monotonic() - begin)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * rate(done)
        sequences, length = plan.shape(step, context)
        ids = stream.take(sequences * length).view(sequences, length).to(student.device)
        optimiser.zero_grad()
        recent = [*recent[-LINE_STEPS + 1 :], backward(student, teacher, ids)]
        torch.nn.utils.clip_grad_norm_(student.parameters(), LARGEST_GRADIENT)
        optimiser.step()
        step, tokens = step + 1, tokens + ids.numel()
        if step == 1 or step % LINE_STEPS == 0:
            kl = torch.stack(recent).mean().item()  # Waits for the device, so only here.
            first = kl if step == 1 else first
            seconds = time.monotonic() - begin
            progress(f"step {step}  KL {kl:.4f}  {tokens / seconds:.0f} tokens/s  {seconds:.0f} s")
            if not math.isfinite(kl):
                raise ValueError(f"the training diverged at step {step}: try another --seed")
    student.eval()
    last = torch.stack(recent).mean().item()
    return Trained(step, tokens, time.monotonic() - begin, first, last)
