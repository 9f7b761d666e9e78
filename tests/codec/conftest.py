import pytest
import torch

from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.codec.moments import Moments
from oscar_radix.geometry import Geometry


def random_rows(tokens: int, geometry: Geometry, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Correlated q [T, Hq, D], k and v [T, H, D], the same distribution for every seed."""
    fixed = torch.Generator().manual_seed(7)
    heads, group, d = geometry.kv_heads, geometry.group, geometry.head_dim
    mix_k = torch.randn(heads, d, d, generator=fixed) * torch.logspace(0.5, -1.0, d)
    mix_q = torch.randn(heads, d, d, generator=fixed) * torch.logspace(0, -1.0, d)
    mean_k = torch.randn(heads, d, generator=fixed)
    draw = torch.Generator().manual_seed(seed)
    k = torch.einsum("thd,hed->the", torch.randn(tokens, heads, d, generator=draw), mix_k) + mean_k
    q = torch.einsum("thgd,hed->thge", torch.randn(tokens, heads, group, d, generator=draw), mix_q).flatten(1, 2)
    return q, k, torch.randn(tokens, heads, d, generator=draw)


def fitted_moments(geometry: Geometry) -> Moments:
    accumulator = MomentAccumulator(geometry)
    for layer in range(geometry.layers):
        accumulator.add(layer, *random_rows(8 * geometry.head_dim, geometry, seed=layer))
    return accumulator.finish()


@pytest.fixture(scope="session")
def geometry() -> Geometry:
    return Geometry(layers=2, kv_heads=3, query_heads=6, head_dim=64)


@pytest.fixture(scope="session")
def moments(geometry) -> Moments:
    return fitted_moments(geometry)


@pytest.fixture(scope="session")
def random_covariance() -> torch.Tensor:
    x = torch.randn(2, 3, 500, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * torch.logspace(0, -1, 64)
    return x.mT @ x / 500
