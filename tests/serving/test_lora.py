"""A LoRA adapter on our server: it answers like a bf16 server with the same adapter, in prefill, after a hit and in decode."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from oscar_radix.model import prepare
from tests.serving import client
from tests.serving.client import COMMON_ARGS, NO_PLUGIN, OSCAR_ARGS, cached, log_text, pages, piece, serve, settled

RANK, STRENGTH = 8, 0.09
TOLERANCE = 0.15
"""Largest mean |difference| of a token's log-probability, ours against bf16."""
PROMPT, HIT = 300, 200


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folder of an adapter with random weights on the attention's projections."""
    folder = tmp_path_factory.mktemp("adapter")
    model = json.loads((prepare() / "config.json").read_text())
    hidden, head = model["hidden_size"], model["hidden_size"] // model["num_attention_heads"]
    widths = {
        "q_proj": hidden,
        "k_proj": head * model["num_key_value_heads"],
        "v_proj": head * model["num_key_value_heads"],
        "o_proj": hidden,
    }
    draw = torch.Generator().manual_seed(5)
    weights = {}
    for layer in range(model["num_hidden_layers"]):
        for name, width in widths.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = (torch.randn(RANK, hidden, generator=draw) * STRENGTH).bfloat16()
            weights[f"{at}.lora_B.weight"] = (torch.randn(width, RANK, generator=draw) * STRENGTH).bfloat16()
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(widths), "bias": "none", "lora_dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def asked(server, lora: str | None) -> tuple[list[dict], np.ndarray]:
    """A prompt, and its beginning with another end, which hits the cache: answers, and all their log-probabilities."""
    prompt = piece(PROMPT, seed=50)
    more = {"lora_path": lora} if lora else {}
    answers = [
        server.generate(prompt, 24, ignore_eos=True, return_logprob=True, logprob_start_len=start, **more)
        for prompt, start in ((prompt, 0), (prompt[:HIT] + piece(80, seed=51), HIT))
    ]
    metas = [answer["meta_info"] for answer in answers]
    values = [value for meta in metas for value, *_ in meta["input_token_logprobs"][1:]]
    return answers, np.array(values, dtype=np.float32)


def decoded_again(server, answer: dict, lora: str) -> np.ndarray:
    """|difference| between an answer's log-probabilities as decoded, and as a prompt."""
    prompt = piece(PROMPT, seed=50)
    whole = server.generate(prompt + answer["output_ids"], 1, return_logprob=True, logprob_start_len=PROMPT - 1, lora_path=lora)
    before = [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
    after = [value for value, *_ in whole["meta_info"]["input_token_logprobs"][1:]]
    return np.abs(np.array(before) - np.array(after[: len(before)]))


@pytest.mark.gpu
def test_adapter_answers_as_in_bf16(adapter, logs):
    if not client.on_gpu:
        pytest.skip("SGLang 0.5.17 serves adapters on a GPU only: pytest --on-gpu")
    lora = ("--enable-lora", "--lora-paths", f"tilt={adapter}", "--lora-backend", "triton", "--max-lora-rank", str(RANK))
    stock = [*COMMON_ARGS, "--max-total-tokens", "4096", "--mem-fraction-static", "0.5", "--attention-backend", "triton"]
    with serve("lora-bf16", [*stock, *lora], logs, NO_PLUGIN) as server:
        _, expected = asked(server, "tilt")
        _, plain = asked(server, None)
    with serve("lora", [*OSCAR_ARGS, *lora], logs) as server:
        answers, actual = asked(server, "tilt")
        assert "LoRA adapters would be added to the folded projections" in log_text(server)
        assert cached(answers[1]) == pages(HIT)
        again = decoded_again(server, answers[0], "tilt")
        settled(server)
    print(
        f"the adapter changes {np.abs(expected - plain).mean():.3f}; ours is {np.abs(actual - expected).mean():.3f} from bf16, "
        f"decode {again.mean():.3f} from prefill"
    )
    assert np.abs(expected - plain).mean() > 3 * TOLERANCE, "the adapter does nothing"
    assert np.abs(actual - expected).mean() < TOLERANCE
    assert again.mean() < TOLERANCE
