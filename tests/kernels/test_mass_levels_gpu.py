"""Kernels of `mass` and `levels` against the plain-torch specification, on a CUDA device."""

import numpy as np
import pytest
import torch

from oscar_radix.geometry import Geometry
from tests.kernels.mass_levels_cases import SCALE, compare_kept, compare_levels, compare_mass, random_store, sample_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = [
    Geometry(2, 8, 32, 128),
    Geometry(3, 4, 28, 128),
    Geometry(2, 3, 9, 64),
    Geometry(1, 2, 2, 128),
    Geometry(2, 2, 16, 64),
    Geometry(1, 1, 16, 128),
]


@pytest.mark.parametrize("geometry", SHAPES, ids=str)
@pytest.mark.parametrize("queries", [1, 3, 4, 16])
def test_mass(geometry, queries):
    for refined in ((), (0,)):
        compare_mass(geometry, [2049, 33, 700, 1, 128], queries, 0, seed=queries, device="cuda", shared_pages=4, refined=refined)


@pytest.mark.parametrize("nearest", [1, 31, 32, 33, 4096])
@pytest.mark.parametrize("length", [31, 32, 33, 127, 2048, 2080])
def test_mass_at_the_edges_of_pages_tiles_and_programs(length, nearest):
    if nearest >= length:
        nearest = 0
    compare_mass(Geometry(2, 4, 16, 128), [length, length, 500], 2, nearest, seed=length, device="cuda")


@pytest.mark.parametrize(("heads", "dim"), [(32, 128), (28, 128), (9, 64)])
def test_kept_queries(heads, dim):
    compare_kept(heads, dim, [300, 1, 31, 32, 33], queries=32, seed=heads, device="cuda")


def test_mass_of_a_sequence_is_one_a_query_head():
    from oscar_radix.pool.mass import MassTable

    geometry = Geometry(2, 4, 16, 128)
    store = random_store(geometry, 100, 0, "cuda")
    table = MassTable(geometry, 101, 100, "cuda")
    table.track(np.arange(1, 101))
    sample, *sequences = sample_of(store, table, [1000, 999, 17], 1, 1, shared_pages=10)
    sample.add(*sequences, SCALE)
    torch.testing.assert_close(table.values.sum(dim=(1, 3)), torch.full((2, 4), 3.0 * geometry.group, device="cuda"), rtol=5e-3, atol=0)
    assert table.visits.sum().item() == 1000 + 999 + 17


@pytest.mark.parametrize("geometry", SHAPES, ids=str)
@pytest.mark.parametrize("level", [2, 4, 8])
def test_levels(geometry, level):
    compare_levels(geometry, level, pages=37, seed=level, device="cuda")


def test_levels_of_many_pages():
    """Blocks are permuted over the pool and rows move within a page's own: a row read too late would show here."""
    for seed in range(5):
        compare_levels(Geometry(4, 8, 32, 128), 8, pages=300, seed=seed, device="cuda")
