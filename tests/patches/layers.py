"""Attention layers made of SGLang's own modules, and the server arguments that go with them."""

from types import SimpleNamespace

import torch
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.models.llama import LlamaAttention
from torch import nn

from oscar_radix.codec import DEFAULT_RECIPE
from oscar_radix.config import OscarConfig

HIDDEN, DIM = 96, 64


def arguments(**changes: object) -> SimpleNamespace:
    """What `obstacle` reads of SGLang's ServerArgs, at its defaults."""
    values = {
        "_oscar_config": OscarConfig(recipe=DEFAULT_RECIPE),
        "enable_lora": None,
        "lora_paths": [],
        "checkpoint_engine_wait_weights_before_ready": False,
        "custom_weight_loader": [],
        "weight_cache_mode": "off",
        "remote_instance_weight_loader_start_seed_via_transfer_engine": False,
        "remote_instance_weight_loader_backend": "nccl",
        "cpu_offload_gb": 0,
        "offload_group_size": -1,
    }
    return SimpleNamespace(**{**values, **changes})


def attention(queries: int, heads: int, bias: bool, layer: int, rank: int = 0, ranks: int = 1, dtype=torch.float64) -> LlamaAttention:
    """SGLang's attention module of one rank, without its constructor's global state: `queries` and `heads` are the model's."""
    module = LlamaAttention.__new__(LlamaAttention)
    nn.Module.__init__(module)
    place = {"tp_rank": rank, "tp_size": ranks, "params_dtype": dtype}
    module.qkv_proj = QKVParallelLinear(HIDDEN, DIM, queries, heads, bias=bias, **place)
    module.o_proj = RowParallelLinear(queries * DIM, HIDDEN, bias=bias, **place)
    module.attn = RadixAttention(queries // ranks, DIM, DIM**-0.5, num_kv_heads=max(1, heads // ranks), layer_id=layer)
    generator = torch.Generator().manual_seed(layer)
    for parameter in module.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * HIDDEN**-0.5)
    return module


def model(*layers: nn.Module) -> nn.Module:
    """What a model's modules are called."""
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"self_attn": layer}) for layer in layers)})


def rotations(layers: int, heads: int) -> torch.Tensor:
    """Orthonormal float64 [layers, heads, D, D]."""
    generator = torch.Generator().manual_seed(9)
    return torch.linalg.qr(torch.randn(layers, heads, DIM, DIM, generator=generator, dtype=torch.float64))[0]
