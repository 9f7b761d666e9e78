import pytest
import torch

from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.codec.moments import Moments
from oscar_radix.geometry import Geometry


def rows(geometry: Geometry, tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gaussian q [T, Hq, D], k, v [T, H, D]."""
    draw = torch.Generator().manual_seed(seed)
    heads = (geometry.query_heads, geometry.kv_heads, geometry.kv_heads)
    return tuple(torch.randn(tokens, h, geometry.head_dim, generator=draw) for h in heads)


@pytest.fixture(scope="session")
def geometry() -> Geometry:
    return Geometry(layers=2, kv_heads=4, query_heads=8, head_dim=64)


@pytest.fixture(scope="session")
def moments(geometry) -> Moments:
    accumulator = MomentAccumulator(geometry)
    for layer in range(geometry.layers):
        accumulator.add(layer, *rows(geometry, 600, seed=layer))
    return accumulator.finish()


@pytest.fixture(scope="session")
def model_dir():
    from oscar_radix.model import prepare

    return prepare()


@pytest.fixture(scope="session")
def loaded(model_dir):
    """(model, tokenizer) of the embedded model."""
    from oscar_radix.calibration.collect import load_model

    return load_model(model_dir)
