"""Put a function of ours in place of a transformers model's attention."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from oscar_radix.geometry import Geometry

_NAME = "oscar_radix"

Attention = Callable[[int, Tensor, Tensor, Tensor, float], Tensor]
"""(layer, q [T, Hq, D], k [S, H, D], v [S, H, D], scale) to [T, Hq, D]; q and k post-RoPE, the last T of the S keys are q's own."""


def geometry_of(config: Any) -> Geometry:
    """Attention shape of a transformers config (the whole model, before tensor parallelism)."""
    text = config.get_text_config()
    queries = text.num_attention_heads
    return Geometry(
        layers=text.num_hidden_layers,
        kv_heads=getattr(text, "num_key_value_heads", None) or queries,
        query_heads=queries,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // queries,
    )


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Exact causal attention of one sequence: q [T, Hq, D], k, v [S, H, D], the queries being the last T of S positions."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    tokens, keys = q.shape[2], k.shape[2]
    mask = None
    if tokens != keys:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=q.device).tril(keys - tokens)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@contextmanager
def replaced_attention(model: Any, function: Attention) -> Iterator[None]:
    """While active, every attention layer of `model` calls `function`; batches of one sequence only."""

    def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any) -> tuple[Tensor, None]:
        if query.shape[0] != 1:
            raise ValueError(f"one sequence at a time, got a batch of {query.shape[0]}")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return function(module.layer_idx, q, k, v, scaling).to(query.dtype).unsqueeze(0), None

    before = model.config._attn_implementation
    AttentionInterface.register(_NAME, attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
