"""Models whose cache is not plain multi-head or grouped-query attention are refused by name, with the reason."""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention

from oscar_radix.patches.attention import _refuse_layers
from oscar_radix.patches.refusals import Refused, refuse_model


def configurator(**changes: object) -> SimpleNamespace:
    """The attributes of SGLang's KVCacheConfigurator that `refuse_model` reads, of a Llama; `changes` go where they belong."""
    model = {"is_encoder_decoder": False, "is_generation": True, "head_dim": 128, "v_head_dim": 128}
    cache = {"use_mla_backend": False, "is_hybrid_swa": False, "mambaish_config": None, "device": "cpu"}
    for name, value in changes.items():
        (model if name in model else cache)[name] = value
    config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["SomeForCausalLM"]), **model)
    return SimpleNamespace(model_config=config, **cache)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_plain_models_are_served(head_dim):
    refuse_model(configurator(head_dim=head_dim, v_head_dim=head_dim))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_mla_backend": True}, "multi-head latent attention"),
        ({"is_hybrid_swa": True}, "sliding-window layers"),
        ({"mambaish_config": object()}, "state-space layers"),
        ({"is_encoder_decoder": True}, "cross-attention"),
        ({"is_generation": False}, "embeddings"),
        ({"head_dim": 80, "v_head_dim": 80}, "head dims 80 (K) and 80 (V); supported on cpu are equal ones of (64, 128, 256)"),
        ({"head_dim": 256, "v_head_dim": 256, "device": "cuda"}, "supported on cuda are equal ones of (64, 128)"),
        ({"head_dim": 128, "v_head_dim": 64}, "head dims 128 (K) and 64 (V)"),
    ],
)
def test_refused_model(changes, reason):
    with pytest.raises(Refused) as error:
        refuse_model(configurator(**changes))
    message = str(error.value)
    assert message.startswith("--kv-quant oscar: SomeForCausalLM ")
    assert reason in message
    assert message.endswith("serve it without --kv-quant")


def model_with(**changes: object) -> torch.nn.Module:
    layer = RadixAttention(num_heads=2, head_dim=64, scaling=0.125, num_kv_heads=1, layer_id=0, **changes)
    return torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"attn": layer})})


def test_plain_layers_are_served():
    _refuse_layers(model_with())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"logit_cap": 30.0}, "block.attn caps its attention scores at 30.0"),
        ({"sliding_window_size": 512}, "block.attn has a sliding window of 512"),
        ({"is_cross_attention": True}, "block.attn is not causal self-attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "block.attn is not causal self-attention"),
    ],
)
def test_refused_layer(changes, reason):
    with pytest.raises(Refused) as error:
        _refuse_layers(model_with(**changes))
    assert reason in str(error.value)
    assert str(error.value).endswith("serve it without --kv-quant")
