"""A model that cannot be folded is left alone, all layers of it, with the reason in the log."""

import logging
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod
from sglang.srt.models.llama import LlamaAttention
from sglang.srt.server_args import prepare_server_args
from torch import nn

from oscar_radix.codec import DEFAULT_RECIPE, get_recipe
from oscar_radix.codec.parameters import placeholder
from oscar_radix.config import OscarConfig
from oscar_radix.geometry import Geometry
from oscar_radix.patches.fold_values import fold_weights, obstacle, prepare_to_fold
from tests.patches.layers import DIM, HIDDEN, arguments, attention, model, rotations


class OtherAttention(LlamaAttention):
    """May override anything."""


def quantised(layer: nn.Module) -> None:
    layer.o_proj.quant_method = Fp8LinearMethod.__new__(Fp8LinearMethod)


def integer_weights(layer: nn.Module) -> None:
    layer.qkv_proj.weight = nn.Parameter(layer.qkv_proj.weight.to(torch.int8), requires_grad=False)


def plain_linear(layer: nn.Module) -> None:
    layer.o_proj = nn.Linear(4 * DIM, HIDDEN)


def no_qkv(layer: nn.Module) -> None:
    del layer.qkv_proj


def other_class(layer: nn.Module) -> None:
    layer.__class__ = OtherAttention


def amx(layer: nn.Module) -> None:
    layer.o_proj.use_intel_amx_backend = True


def narrow(layer: nn.Module) -> None:
    layer.qkv_proj.weight = nn.Parameter(layer.qkv_proj.weight[DIM:], requires_grad=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (quantised, "layers.1.self_attn.o_proj is quantised (Fp8LinearMethod)"),
        (integer_weights, "layers.1.self_attn.qkv_proj has weights of torch.int8"),
        (plain_linear, "layers.1.self_attn.o_proj is a Linear, not SGLang's RowParallelLinear"),
        (no_qkv, "layers.1.self_attn.qkv_proj is a NoneType, not SGLang's QKVParallelLinear"),
        (other_class, "OtherAttention, which may do more than project V and the output"),
        (amx, "layers.1.self_attn.o_proj has weights packed for Intel AMX"),
        (narrow, "layers.1.self_attn.qkv_proj has weights of shape (448, 96), expected 512 along axis 0"),
    ],
)
def test_one_layer_that_cannot_be_folded_keeps_all_unfolded(change, reason, caplog):
    layers = [attention(4, 2, False, layer) for layer in range(2)]
    change(layers[1])
    whole = model(*layers)
    assert reason in obstacle(whole, arguments())
    check_left_alone(whole, arguments(), reason, caplog)


def test_shared_weights(caplog):
    layers = [attention(4, 2, False, layer) for layer in range(2)]
    layers[1].o_proj.weight = layers[0].o_proj.weight
    check_left_alone(model(*layers), arguments(), "layers.0.self_attn.o_proj shares its weights with another module", caplog)


def test_a_model_without_attention(caplog):
    check_left_alone(nn.Linear(2, 2), arguments(), "the model has no attention layer that SGLang knows", caplog)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"_oscar_config": OscarConfig(recipe=DEFAULT_RECIPE, fold_values="off")}, "--oscar-fold-values off"),
        ({"enable_lora": True}, "LoRA adapters would be added to the folded projections"),
        ({"lora_paths": ["adapter"]}, "LoRA adapters would be added to the folded projections"),
        ({"checkpoint_engine_wait_weights_before_ready": True}, "weights are to be updated while the server runs"),
        ({"custom_weight_loader": ["package.load"]}, "weights are to be updated while the server runs"),
        ({"weight_cache_mode": "client"}, "--weight-cache-mode shares the weights with other processes"),
        ({"remote_instance_weight_loader_start_seed_via_transfer_engine": True}, "other servers load the weights from this one's memory"),
        ({"remote_instance_weight_loader_backend": "modelexpress"}, "other servers load the weights from this one's memory"),
        ({"cpu_offload_gb": 4}, "offloaded weights are not where the layers say"),
        ({"offload_group_size": 2}, "offloaded weights are not where the layers say"),
    ],
)
def test_flags_that_keep_all_unfolded(changes, reason, caplog):
    check_left_alone(model(attention(4, 2, False, 0)), arguments(**changes), reason, caplog)


def check_left_alone(whole: nn.Module, server_args: SimpleNamespace, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """The placeholder stays unfolded with one log line that has the reason; folding later is refused and changes nothing."""
    codec = placeholder(get_recipe(DEFAULT_RECIPE), Geometry(layers=1, kv_heads=2, query_heads=4, head_dim=DIM), "cpu")
    with caplog.at_level(logging.INFO, logger="oscar_radix"):
        prepare_to_fold(codec, whole, server_args)
    assert not codec.values_folded
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("kv-quant oscar: the rotation of V stays at run time: ")
    assert reason in line
    before = [parameter.clone() for parameter in whole.parameters()]
    with pytest.raises(RuntimeError, match=r"cannot be made now: .*start with --oscar-fold-values off"):
        fold_weights(whole, server_args, rotations(2, 2))
    assert all(torch.equal(old, new) for old, new in zip(before, whole.parameters(), strict=True))


@pytest.mark.usefixtures("plugin")
@pytest.mark.parametrize(
    ("flags", "reason"),
    [([], None), (["--oscar-fold-values", "off"], "--oscar-fold-values off"), (["--enable-lora"], "LoRA adapters")],
    ids=str,
)
def test_sglangs_own_arguments(flags, reason, model_folder):
    """`arguments` of these tests has the names and defaults of the real ones."""
    lora = ["--max-lora-rank", "8", "--lora-target-modules", "v_proj"] if "--enable-lora" in flags else []
    server_args = prepare_server_args(["--model-path", model_folder, "--device", "cpu", "--kv-quant", "oscar", *flags, *lora])
    found = obstacle(model(attention(4, 2, False, 0)), server_args)
    assert found is None if reason is None else reason in found


@pytest.mark.usefixtures("plugin")
def test_an_unknown_value_of_the_flag(capsys):
    with pytest.raises(SystemExit):
        prepare_server_args(["--model-path", "no-model", "--kv-quant", "oscar", "--oscar-fold-values", "on"])
    assert "argument --oscar-fold-values: invalid choice: 'on'" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--oscar-fold-values on is unknown; choose from auto, off"):
        OscarConfig(recipe=DEFAULT_RECIPE, fold_values="on")
