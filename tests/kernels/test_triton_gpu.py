"""Triton kernels against the plain-torch specification, on a CUDA device."""

import pytest
import torch

from oscar_radix.attention.plan import plan_forward
from oscar_radix.geometry import Geometry
from oscar_radix.sequence import Sequence
from tests.helpers import random_qkv
from tests.kernels.pair import SCALE, Pair

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = [
    Geometry(1, 8, 32, 128),
    Geometry(1, 4, 28, 128),
    Geometry(1, 3, 9, 64),
    Geometry(1, 2, 2, 128),
    Geometry(1, 2, 16, 64),
]


@pytest.mark.parametrize("geometry", SHAPES, ids=str)
@pytest.mark.parametrize(("recipe", "refined"), [("tck", ()), ("mulm", ()), ("tck", (0,))])
def test_a_conversation(geometry, recipe, refined):
    pair = Pair(geometry, recipe, lengths=[700, 130, 45], hot_pages=12, refined=refined)
    pair.step({0: 333, 1: 1, 2: 31})
    pair.step({0: 200})
    pair.step({1: 95, 2: 2})
    for _ in range(34):
        pair.step({2: 1, 0: 1, 1: 1} if pair.done[2] < 45 else {0: 1, 1: 1}, decode=True)
    pair.step({0: 77})
    pair.step({0: 1, 1: 1}, decode=True)


@pytest.mark.parametrize("level", [0, 2, 4, 8, 32])
def test_every_level(level):
    pair = Pair(Geometry(1, 4, 16, 128), "tck", lengths=[900, 400], hot_pages=60, level=level)
    pair.step({0: 640, 1: 320})
    for _ in range(3):
        pair.step({0: 1, 1: 1}, decode=True)
    levels = pair.stores[1].hot.levels
    assert level in levels[pair.pages[0][:10]]
    pair.step({0: 100})


def test_bad_rows_are_counted_and_do_not_spread():
    pair = Pair(SHAPES[0], "tck", lengths=[128], hot_pages=8)
    pair.step({0: 64})
    q, k, v = (x.cuda() for x in random_qkv(pair.geometry, 1, pair.draw))
    k[0, 1, 5] = float("nan")
    v[0, 2, 7] = float("inf")
    from oscar_radix.attention.triton_backend import DecodeBatch

    sequence = Sequence(pair.pages[0][:3], 64, 65, True)
    plan_forward(pair.stores[1], [sequence])
    slots = pair.rows[0, 64:65].long()
    batch = DecodeBatch(pair.rows, torch.zeros(1, dtype=torch.int64, device="cuda"), torch.tensor([65], device="cuda"), slots)
    pair.ours.prepare_decode(batch)
    out = pair.ours.decode(0, q, k, v, batch, SCALE)
    assert torch.isfinite(out).all()
    assert pair.stores[1].bad_rows.item() == 2
