"""SmolLM2 as a Qwen2 of twice its head dim: first exactly the same function, then with channels and key biases of its own."""

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

NOISE_SHARE, VALUE_SHARE = 0.3, 1.0
"""Deviation of random projections in new channels, in deviations of the head's old ones."""
SLOW_BIAS, FAST_BIAS = 10.0, 1.0
"""Deviation of key biases, in deviations of the head's keys: in the slowest RoPE pairs, where Qwen2.5 has its large ones, and elsewhere."""
SLOW_PAIRS = 10 / 64
"""Share of a head's RoPE pairs that count as slow."""


def wide_config(narrow: Any) -> Qwen2Config:
    """Sizes of a Llama config, head dim doubled."""
    rope = dict(narrow.rope_parameters)
    if rope["rope_type"] != "default" or narrow.attention_bias or narrow.mlp_bias:
        raise ValueError("only a Llama without biases and without RoPE scaling can be widened: take SmolLM2")
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
        "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )
    copied = {name: getattr(narrow, name) for name in same}
    return Qwen2Config(**copied, head_dim=2 * narrow.head_dim, rope_parameters=rope, architectures=["Qwen2ForCausalLM"])


def rotary_channels(head_dim: int) -> Tensor:
    """[head_dim]: where each q or k channel stands in a head of twice `head_dim`, both laid out in halves.

    Pair j, channels j and j + head_dim / 2, turns by theta ** (-2j / head_dim) a position; so does pair 2j of the wide head.
    """
    pairs = 2 * torch.arange(head_dim // 2)
    return torch.cat((pairs, pairs + head_dim))


def widen(narrow: Any) -> Qwen2ForCausalLM:
    """A float32 Qwen2 that computes what the Llama `narrow` does: new channels and all biases are zero."""
    config = wide_config(narrow.config)
    old, new = narrow.config.head_dim, config.head_dim
    rotary, plain = rotary_channels(old), torch.arange(old)
    # The softmax scale falls from old ** -.5 to new ** -.5.
    rows = {"q_proj": (rotary, (new / old) ** 0.5), "k_proj": (rotary, 1.0), "v_proj": (plain, 1.0)}
    state = {}
    for name, value in narrow.state_dict().items():
        value = value.detach().float().cpu()
        part, kind = name.split(".")[-2:]
        if part in rows:
            channels, factor = rows[part]
            heads = value.view(-1, old, value.shape[-1])
            wide = heads.new_zeros(len(heads), new, heads.shape[-1])
            wide[:, channels] = factor * heads
            state[name] = wide.flatten(0, 1)
            state[name.removesuffix(kind) + "bias"] = state[name].new_zeros(len(state[name]))
        elif part == "o_proj":
            columns = value.view(len(value), -1, old)
            wide = columns.new_zeros(len(value), columns.shape[1], new)
            wide[..., plain] = columns
            state[name] = wide.flatten(1)
        else:
            state[name] = value.clone()
    model = Qwen2ForCausalLM(config)
    model.load_state_dict(state)
    return model.to(narrow.device)


@torch.no_grad()
def attention_inputs(model: Any, ids: Tensor) -> list[Tensor]:
    """Per layer what q, k and v are projected from, [tokens, hidden]; ids [tokens]."""
    states = model.model(ids[None], output_hidden_states=True, use_cache=False).hidden_states
    return [layer.input_layernorm(state)[0] for layer, state in zip(model.model.layers, states[:-1], strict=True)]


@torch.no_grad()
def deviations(weight: Tensor, inputs: Tensor, head_dim: int) -> Tensor:
    """[heads, head_dim]: deviation over `inputs` [tokens, hidden] of the channels that `weight` [heads * head_dim, hidden] makes."""
    return (inputs @ weight.T.to(inputs.dtype)).float().std(0).view(-1, head_dim)


@torch.no_grad()
def fill(model: Qwen2ForCausalLM, ids: Tensor, seed: int) -> None:
    """Give a model just widened its new channels and key biases, in units measured on `ids` [tokens].

    Every RoPE pair of q and k is shared by two, itself and the next, which turns a little slower: each half of the scores, so that no
    channel can be done without. The columns of o_proj that read new values stay zero until they are trained.
    """
    generator = torch.Generator().manual_seed(seed)
    head_dim = model.config.head_dim
    rotary, plain = rotary_channels(head_dim // 2), torch.arange(head_dim // 2)
    # Measured on the exact function: all inputs first, then the changes.
    for layer, inputs in zip(model.model.layers, attention_inputs(model, ids), strict=True):
        attention = layer.self_attn
        key_size = _sizes(attention.k_proj.weight, inputs, rotary, head_dim)
        for projection, old, share in (
            (attention.q_proj, rotary, NOISE_SHARE), (attention.k_proj, rotary, NOISE_SHARE), (attention.v_proj, plain, VALUE_SHARE)
        ):
            _fill_rows(projection.weight, inputs, old, head_dim, share, generator)
        for projection in (attention.q_proj, attention.k_proj):
            heads = projection.weight.view(-1, head_dim, projection.weight.shape[-1])
            heads[:, rotary] *= 0.5**0.5
            heads[:, rotary + 1] += heads[:, rotary]
        factors = torch.full((head_dim // 2,), FAST_BIAS)
        factors[-max(1, round(SLOW_PAIRS * len(factors))) :] = SLOW_BIAS
        noise = torch.randn(len(key_size), head_dim, generator=generator) * factors.repeat(2)
        attention.k_proj.bias.copy_((noise.to(key_size.device) * key_size[:, None]).flatten())


def _sizes(weight: Tensor, inputs: Tensor, old: Tensor, head_dim: int) -> Tensor:
    """[heads]: root mean square of the deviations of a head's old channels."""
    return deviations(weight, inputs, head_dim)[:, old.to(weight.device)].square().mean(-1).sqrt()


def _fill_rows(weight: Tensor, inputs: Tensor, old: Tensor, head_dim: int, share: float, generator: torch.Generator) -> None:
    """Random rows for the channels that are not `old`, each with `share` of the deviation of its head's old ones."""
    new = torch.ones(head_dim, dtype=torch.bool)
    new[old] = False
    new = new.to(weight.device)
    random = torch.randn(weight.shape, generator=generator).to(weight.device)
    wanted = share * _sizes(weight, inputs, old, head_dim)[:, None] / deviations(random, inputs, head_dim)
    heads = weight.view(-1, head_dim, weight.shape[-1])
    heads[:, new] = (random.view_as(heads) * wanted[..., None])[:, new]
