"""The rotation R of V in the model's weights: the value projection gives v R, the output projection takes o R.

v = x W_v^T + b, so rows of W_v become R^T W_v and b becomes b R; out = o W_o^T = (o R) (W_o R)^T, so the columns of W_o that read a
query head are multiplied by R of its KV head. The calibration stays that of the unfolded model; only a running model is folded.
"""

import logging
from collections import Counter
from typing import Any

import torch
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.radix_attention import RadixAttention
from torch import Tensor, nn

from oscar_radix.codec import Codec
from oscar_radix.patches.flags import config_of

logger = logging.getLogger("oscar_radix")

FOLDABLE_ATTENTION = {
    "sglang.srt.models.llama.LlamaAttention",
    "sglang.srt.models.mixtral.MixtralAttention",
    "sglang.srt.models.qwen2.Qwen2Attention",
    "sglang.srt.models.qwen2_moe.Qwen2MoeAttention",
    "sglang.srt.models.qwen3.Qwen3Attention",
    "sglang.srt.models.qwen3_moe.Qwen3MoeAttention",
}
"""Modules whose forward does nothing to V between qkv_proj and attention, nor to the output before o_proj. A shape cannot tell that."""

FOLDABLE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def prepare_to_fold(codec: Codec, model: nn.Module, server_args: Any) -> None:
    """Decide when the attention backend is built: fold the placeholder `codec` if all layers will be folded, else log why none is."""
    if codec.values_folded:
        return
    reason = obstacle(model, server_args)
    if reason is None:
        codec.fold_values()
    else:
        logger.info("kv-quant oscar: the rotation of V stays at run time: %s", reason)


def obstacle(model: nn.Module, server_args: Any) -> str | None:
    """Why the weights cannot be folded, in one line; None when they can."""
    return _flag_obstacle(server_args) or _model_obstacle(model)


def _flag_obstacle(args: Any) -> str | None:
    if config_of(args).fold_values == "off":
        return "--oscar-fold-values off"
    if args.enable_lora or args.lora_paths:
        return "LoRA adapters would be added to the folded projections"
    if args.checkpoint_engine_wait_weights_before_ready or args.custom_weight_loader:
        return "weights are to be updated while the server runs"
    if args.weight_cache_mode != "off":
        return "--weight-cache-mode shares the weights with other processes"
    if args.remote_instance_weight_loader_start_seed_via_transfer_engine or args.remote_instance_weight_loader_backend == "modelexpress":
        return "other servers load the weights from this one's memory"
    if args.cpu_offload_gb > 0 or args.offload_group_size > 0:
        return "offloaded weights are not where the layers say"
    return None


def _model_obstacle(model: nn.Module) -> str | None:
    modules = dict(model.named_modules())
    owners = [name.rpartition(".")[0] for name, module in modules.items() if isinstance(module, RadixAttention)]
    if not owners:
        return "the model has no attention layer that SGLang knows"
    uses = Counter(parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in owners:
        reason = _layer_obstacle(modules[name], uses)
        if reason:
            return f"{name}{reason}"
    return None


def _layer_obstacle(module: nn.Module, uses: Counter) -> str | None:
    """What follows the layer's name; `uses` counts parameters by address."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind not in FOLDABLE_ATTENTION:
        return f" is a {kind}, which may do more than project V and the output"
    attention = module.attn
    queries, heads, dim = attention.tp_q_head_num, attention.tp_v_head_num, attention.v_head_dim
    widths = {"qkv_proj": (0, (queries + 2 * heads) * dim), "o_proj": (1, queries * dim)}
    for name, linear_type in (("qkv_proj", QKVParallelLinear), ("o_proj", RowParallelLinear)):
        linear = getattr(module, name, None)
        if type(linear) is not linear_type:
            return f".{name} is a {type(linear).__name__}, not SGLang's {linear_type.__name__}"
        weight = getattr(linear, "weight", None)
        if type(linear.quant_method) is not UnquantizedLinearMethod or weight is None or type(weight.data) is not Tensor:
            return f".{name} is quantised ({type(linear.quant_method).__name__})"
        if weight.dtype not in FOLDABLE_DTYPES:
            return f".{name} has weights of {weight.dtype}"
        if getattr(linear, "use_intel_amx_backend", False):
            return f".{name} has weights packed for Intel AMX"
        axis, width = widths[name]
        if weight.dim() != 2 or weight.shape[axis] != width:
            return f".{name} has weights of shape {tuple(weight.shape)}, expected {width} along axis {axis}"
        if uses[weight.data_ptr()] != 1:
            return f".{name} shares its weights with another module"
    return None


@torch.no_grad()
def fold_weights(model: nn.Module, server_args: Any, rotation: Tensor) -> None:
    """Fold R into all layers in place, computed in float64 and rounded once to the weights' dtype.

    Args:
        model: this rank's model, for which `prepare_to_fold` found no obstacle.
        server_args: SGLang's.
        rotation: [layers, KV heads, D, D] of this rank, orthonormal, any float dtype.

    Raises:
        RuntimeError: when there is an obstacle now, or another number of layers; nothing is changed then.
    """
    reason = obstacle(model, server_args)
    owners = {module.attn.layer_id: module for module in model.modules() if isinstance(getattr(module, "attn", None), RadixAttention)}
    if reason is None and len(owners) != len(rotation):
        reason = f"the model has {len(owners)} attention layers, the calibration {len(rotation)}"
    if reason:
        raise RuntimeError(
            f"--kv-quant oscar: the attention backend was built for folded weights, which cannot be made now: {reason}; "
            "start with --oscar-fold-values off"
        )
    for matrices, (_, module) in zip(rotation, sorted(owners.items()), strict=True):
        fold_layer(module.qkv_proj, module.o_proj, matrices)


def fold_layer(qkv: nn.Module, o: nn.Module, rotation: Tensor) -> None:
    """One layer, whose KV heads' query heads follow one another.

    Args:
        qkv: weight [(Hq + 2 H) D, hidden] and bias [(Hq + 2 H) D] or None, V's rows last.
        o: weight [hidden, Hq D]; its bias is added after the projection and stays.
        rotation: [H, D, D].
    """
    heads, dim, _ = rotation.shape
    rotation = rotation.to(qkv.weight.device, torch.float64)
    values = qkv.weight.data[-heads * dim :].unflatten(0, (heads, dim))
    outputs = o.weight.data.unflatten(1, (heads, -1, dim))
    # Head by head: float64 copies of a large layer would not fit beside the KV cache.
    for head, matrix in enumerate(rotation):
        values[head].copy_(matrix.mT @ values[head].double())
        outputs[:, head].copy_(outputs[:, head].double() @ matrix)
    if qkv.bias is not None:
        bias = qkv.bias.data[-heads * dim :].view(heads, 1, dim)
        bias.copy_(bias.double() @ rotation)
