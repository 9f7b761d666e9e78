"""How far a recipe moves a model's next-token distributions: the measurement that recipes are chosen by.

A prefix is computed exactly, then goes through the real codec (int8 rows, `seal`, `open`), and the following tokens, teacher-forced,
attend to it. The first and the last tokens of the prefix stay at int8, as the pool keeps them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from oscar_radix.calibration.transformers_attention import causal_attention, replaced_attention
from oscar_radix.codec import Codec, dequantise_rows, quantise_rows

SINK_TOKENS = 64
RECENT_TOKENS = 256


@dataclass(frozen=True)
class Quality:
    """Against exact attention, over `positions` next-token distributions. kl: nats, KL(exact || quantised); kl_error: one
    standard error of the mean; top1: share of positions with the same likeliest token; dnll: rise of the true token's NLL."""

    kl: float
    kl_error: float
    top1: float
    dnll: float
    positions: int


@dataclass(frozen=True)
class Passage:
    """An exact prefix and what follows: prefix K and V per layer [P, H, D], tail token ids [N], exact log-probabilities [N, vocab]."""

    keys: list[Tensor]
    values: list[Tensor]
    tail: Tensor
    exact: Tensor


def quantised_prefix(
    codec: Codec, layer: int, k: Tensor, v: Tensor, key_bits: bool = True, value_bits: bool = True
) -> tuple[Tensor, Tensor]:
    """Keys and values [P, H, D] as a reader finds them, float32 in the basis: sinks and recent tokens int8, the rest 2-bit.

    With key_bits or value_bits off, K or V stays at int8 throughout: shows where the damage comes from.
    """
    read = []
    for y in (codec.keys_to_basis(layer, k), codec.values_to_basis(layer, v)):
        codes, scale, _ = quantise_rows(y)
        read.append((codes, scale, dequantise_rows(codes, scale)))
    (k8, k_scale, k_read), (v8, v_scale, v_read) = read
    cold = slice(SINK_TOKENS, len(k) - RECENT_TOKENS)
    page = [x[cold].transpose(0, 1).unsqueeze(0) for x in (k8, k_scale, v8, v_scale)]
    k_open, v_open = (x[0].transpose(0, 1) for x in codec.open(layer, *codec.seal(layer, *page)))
    if key_bits:
        k_read[cold] = k_open
    if value_bits:
        v_read[cold] = v_open
    return k_read, v_read


def prepare(model: Any, token_ids: list[int], prefix: int) -> Passage:
    """Run the model exactly over `token_ids`; the first `prefix` become the cached prefix, the rest the tail."""
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        keys.append(k[:prefix].clone())
        values.append(v[:prefix].clone())
        return causal_attention(q, k, v, scale)

    ids = torch.tensor([token_ids], device=model.device)
    with replaced_attention(model, attention), torch.inference_mode():
        hidden = model.base_model(input_ids=ids, use_cache=False)[0][:, prefix:]
        exact = model.lm_head(hidden)[0].float().log_softmax(-1)
    return Passage(keys, values, ids[0, prefix:], exact)


def tail_log_probabilities(
    model: Any, passage: Passage, codec: Codec, key_bias: Tensor | None = None, key_bits: bool = True, value_bits: bool = True
) -> Tensor:
    """Log-probabilities [N, vocab] of the tail when its queries read the prefix through `codec`; the tail's own rows are exact.

    key_bias [L, H, D] is added to every key, prefix and tail: exact attention would not notice.
    """
    prefix = len(passage.keys[0])

    def attention(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        bias = 0.0 if key_bias is None else key_bias[layer]
        old_k, old_v = quantised_prefix(codec, layer, passage.keys[layer] + bias, passage.values[layer], key_bits, value_bits)
        keys = torch.cat((old_k, codec.keys_to_basis(layer, k + bias)))
        values = torch.cat((old_v, codec.values_to_basis(layer, v)))
        return codec.output_from_basis(layer, causal_attention(codec.queries_to_basis(layer, q), keys, values, scale))

    positions = torch.arange(prefix, prefix + len(passage.tail), device=model.device).unsqueeze(0)
    with replaced_attention(model, attention), torch.inference_mode():
        hidden = model.base_model(input_ids=passage.tail.unsqueeze(0), position_ids=positions, use_cache=False)[0]
        return model.lm_head(hidden)[0].float().log_softmax(-1)


def quality(passages: list[Passage], log_probabilities: Callable[[Passage], Tensor]) -> Quality:
    """Compare a way to compute tails, such as `tail_log_probabilities` of one codec, with the exact ones."""
    kl, same, rise = [], [], []
    for passage in passages:
        got, exact = log_probabilities(passage), passage.exact
        kl.append((exact.exp() * (exact - got)).sum(-1))
        same.append((exact.argmax(-1) == got.argmax(-1)).float())
        following = passage.tail[1:, None]
        rise.append((exact[:-1].gather(-1, following) - got[:-1].gather(-1, following)).squeeze(-1))
    every = torch.cat(kl)
    error = float(every.std() / len(every) ** 0.5)
    return Quality(float(every.mean()), error, float(torch.cat(same).mean()), float(torch.cat(rise).mean()), len(every))
