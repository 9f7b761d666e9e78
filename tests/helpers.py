"""Small models of a KV cache for the core's tests."""

from functools import lru_cache

import numpy as np
import torch

from oscar_radix.calibration.moments import MomentAccumulator
from oscar_radix.codec import get_recipe
from oscar_radix.codec.tck import TckRecipe
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.policy import POLICIES
from oscar_radix.pool.hot_pool import PAGE_BLOCKS
from oscar_radix.pool.store import KVStore

GEOMETRY = Geometry(layers=2, kv_heads=3, query_heads=6, head_dim=64)


def random_qkv(geometry: Geometry, tokens: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [T, Hq, D], k and v [T, Hkv, D] in bf16, with unequal channels, two outliers and a key mean, as real models have."""
    dim = geometry.head_dim
    spread = torch.logspace(0.5, -0.8, dim)
    spread[:2] *= 4
    q = torch.randn(tokens, geometry.query_heads, dim, generator=generator)
    k = torch.randn(tokens, geometry.kv_heads, dim, generator=generator) * spread + 1.5
    v = torch.randn(tokens, geometry.kv_heads, dim, generator=generator)
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


class RefiningTck(TckRecipe):
    """`tck` with the layers to refine given."""

    def __init__(self, refined: tuple[int, ...]) -> None:
        self.refined = refined

    def refined_layers(self, layers: int) -> int:
        return len(self.refined)

    def _refined(self, *args: object) -> torch.Tensor:
        return torch.tensor(self.refined, dtype=torch.int64)


@lru_cache
def make_codec(recipe: str = "tck", geometry: Geometry = GEOMETRY, device: str = "cpu", refined: tuple[int, ...] = ()):
    """A codec calibrated on random rows; made once, since it does not change."""
    generator = torch.Generator().manual_seed(7)
    moments = MomentAccumulator(geometry)
    for layer in range(geometry.layers):
        moments.add(layer, *random_qkv(geometry, 16 * geometry.head_dim, generator))
    chosen = RefiningTck(refined) if refined and recipe == "tck" else get_recipe(recipe)
    return chosen.codec(chosen.fit(moments.finish()), device)


def make_store(
    pages: int = 64,
    hot_pages: int = 32,
    policy: str = "none",
    recent_tokens: int = 64,
    recipe: str = "tck",
    geometry: Geometry = GEOMETRY,
    device: str = "cpu",
    policy_interval: int = 32,
    host_pages: int = 0,
    hot_rows: float = 8.0,
    refined: tuple[int, ...] = (),
) -> KVStore:
    """A store with a codec, ready to serve."""
    layout = get_recipe(recipe).layout(geometry.head_dim)
    hot_blocks = hot_pages * PAGE_BLOCKS
    by_mass = {"policy_interval": policy_interval, "hot_rows": hot_rows}
    rest = {"host_pages": host_pages, "refined": len(refined)}
    store = KVStore(geometry, layout, pages, hot_blocks, POLICIES[policy](), recent_tokens, device, **by_mass, **rest)
    store.codec = make_codec(recipe, geometry, "cpu" if device == "meta" else device, refined)
    return store


def page_count(tokens: int) -> int:
    """Pages of `tokens` tokens."""
    return -(-tokens // PAGE_TOKENS)


def take_pages(store: KVStore, count: int) -> np.ndarray:
    """Allocate the lowest free pages."""
    free = np.flatnonzero(store.table.owner == 0)
    pages = free[free > 0][:count]
    store.allocate(pages)
    return pages


def record_of(store: KVStore, layer: int, page: int) -> list[torch.Tensor]:
    """k_codes, v_codes and scales of one page, each [Hkv, 32, ...]."""
    return [part[0] for part in store.records(layer, torch.tensor([page]))]
