"""The plugin loaded into this process, as SGLang's launcher loads it."""

import json

import pytest
from sglang.srt.plugins import load_plugins


@pytest.fixture(scope="session")
def plugin() -> None:
    """Hooks applied; once a process, as in a server."""
    load_plugins()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> str:
    """A model that has a configuration and nothing else: enough to parse a command line."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "head_dim": 64,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)
