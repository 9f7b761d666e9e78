"""V's rotation in SGLang's own layers: the folded model answers as before, on every rank, up to the rounding of its weights."""

import importlib

import pytest
import torch
from torch import nn

from oscar_radix.codec import DEFAULT_RECIPE, get_recipe
from oscar_radix.codec.parameters import placeholder
from oscar_radix.geometry import Geometry
from oscar_radix.patches.fold_values import FOLDABLE_ATTENTION, fold_weights, prepare_to_fold
from tests.patches.layers import DIM, HIDDEN, arguments, attention, model, rotations

TOKENS = 20
EXACT = {torch.float64: 1e-10, torch.float32: 1e-6}
"""Of outputs of size 1. Measured 1e-14 and 2e-7: float32 weights are rounded once more."""


def output(module: nn.Module, x: torch.Tensor, mean: torch.Tensor, rotation: torch.Tensor | None = None) -> torch.Tensor:
    """Causal attention of float64 x [T, hidden] as the backend computes it, up to quantisation, without o_proj's bias: float64.

    Values are stored as (v - mu) R; the result leaves the basis by R^T, mu. With `rotation` None the weights hold R already, and
    `mean` is mu R.
    """
    queries, heads = module.attn.tp_q_head_num, module.attn.tp_v_head_num
    qkv = x @ module.qkv_proj.weight.double().mT + (0 if module.qkv_proj.bias is None else module.qkv_proj.bias.double())
    q, k, v = (part.unflatten(1, (-1, DIM)).transpose(0, 1) for part in qkv.split([queries * DIM, heads * DIM, heads * DIM], dim=1))
    rows = v - mean.unsqueeze(1)
    if rotation is not None:
        rows = rows @ rotation
    group = queries // heads
    k, rows = k.repeat_interleave(group, 0), rows.repeat_interleave(group, 0)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, rows, is_causal=True)
    if rotation is not None:
        out = out @ rotation.mT.repeat_interleave(group, 0)
    out = out + mean.repeat_interleave(group, 0).unsqueeze(1)
    return out.transpose(0, 1).flatten(1) @ module.o_proj.weight.double().mT


def hidden_states() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


# Exactness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(("queries", "heads"), [(2, 2), (6, 2), (4, 1)])
def test_folded_layers_answer_as_before(queries, heads, bias, dtype):
    folded = model(*(attention(queries, heads, bias, layer, dtype=dtype) for layer in range(2)))
    mean, rotation, x = torch.randn(2, heads, DIM, dtype=torch.float64), rotations(2, heads), hidden_states()
    layers = [layer["self_attn"] for layer in folded["layers"]]
    before = [output(layer, x, mean[i], rotation[i]) for i, layer in enumerate(layers)]
    addresses = [parameter.data_ptr() for parameter in folded.parameters()]
    untouched = [layer.qkv_proj.weight[: (queries + heads) * DIM].clone() for layer in layers]
    fold_weights(folded, arguments(), rotation)
    assert [parameter.data_ptr() for parameter in folded.parameters()] == addresses
    for i, layer in enumerate(layers):
        after = output(layer, x, torch.einsum("hd,hde->he", mean[i], rotation[i]))
        torch.testing.assert_close(after, before[i], rtol=0, atol=EXACT[dtype])
        assert torch.equal(layer.qkv_proj.weight[: (queries + heads) * DIM], untouched[i]), "queries and keys stay"


@pytest.mark.parametrize(("queries", "heads", "ranks"), [(8, 4, 2), (8, 2, 2), (8, 2, 4), (4, 1, 2)], ids=str)
def test_ranks_fold_on_their_own(queries, heads, ranks):
    """Every rank with rotations of its own, replicated KV heads included; the ranks' outputs add up to the whole model's."""
    whole = attention(queries, heads, True, 0)
    x = hidden_states()
    expected = output(whole, x, torch.zeros(heads, DIM, dtype=torch.float64), torch.eye(DIM, dtype=torch.float64).expand(heads, -1, -1))
    total = torch.zeros_like(expected)
    own_heads = max(1, heads // ranks)
    for rank in range(ranks):
        part = attention(queries, heads, True, 0, rank, ranks)
        own = slice(rank * queries // ranks, (rank + 1) * queries // ranks)
        first = rank * heads // ranks
        for target, source in ((part.qkv_proj.weight, whole.qkv_proj.weight), (part.qkv_proj.bias, whole.qkv_proj.bias)):
            q, k, v = source.data.unflatten(0, (-1, DIM)).split([queries, heads, heads])
            shard = (q[own], k[first : first + own_heads], v[first : first + own_heads])
            target.data.copy_(torch.cat(shard).flatten(0, 1))
        part.o_proj.weight.data.copy_(whole.o_proj.weight.data[:, own.start * DIM : own.stop * DIM])
        rotation = rotations(ranks, own_heads)[rank : rank + 1]
        fold_weights(model(part), arguments(), rotation)
        total += output(part, x, torch.zeros(own_heads, DIM, dtype=torch.float64))
    torch.testing.assert_close(total, expected, rtol=0, atol=EXACT[torch.float64])


def test_bf16_weights_are_rounded_once():
    layer = attention(6, 2, True, 0, dtype=torch.bfloat16)
    rotation = rotations(1, 2)
    rows = layer.qkv_proj.weight[-2 * DIM :].double().unflatten(0, (2, DIM))
    columns = layer.o_proj.weight.double().unflatten(1, (2, 3, DIM))
    fold_weights(model(layer), arguments(), rotation)
    exact_rows, exact_columns = rotation[0].mT @ rows, torch.einsum("nhgd,hde->nhge", columns, rotation[0])
    # Half a unit in the last of bf16's 8 places.
    torch.testing.assert_close(layer.qkv_proj.weight[-2 * DIM :].double(), exact_rows.flatten(0, 1), rtol=2**-8, atol=0)
    torch.testing.assert_close(layer.o_proj.weight.double(), exact_columns.flatten(1), rtol=2**-8, atol=0)


# Models that are folded ----------------------------------------------------------------------------------------------


def test_the_placeholder_says_so_before_there_is_a_calibration(caplog):
    codec = placeholder(get_recipe(DEFAULT_RECIPE), Geometry(layers=1, kv_heads=2, query_heads=4, head_dim=DIM), "cpu")
    whole = model(attention(4, 2, False, 0))
    for _ in range(2):
        prepare_to_fold(codec, whole, arguments())
        assert codec.values_folded
        assert torch.equal(codec.value_rotation, torch.eye(DIM).expand_as(codec.value_rotation))
    assert not caplog.records


def test_another_number_of_layers_is_refused():
    with pytest.raises(RuntimeError, match="the model has 1 attention layers, the calibration 2"):
        fold_weights(model(attention(4, 2, False, 0)), arguments(), rotations(2, 2))


def test_names_of_foldable_modules_exist():
    """A renamed class would silently never be folded."""
    for name in FOLDABLE_ATTENTION:
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__qualname__ == attribute
