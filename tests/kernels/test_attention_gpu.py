"""Decode and extend kernels against float64 attention, on a CUDA device: odd sizes, every level, poisoned outputs."""

import random

import pytest
import torch

from oscar_radix.geometry import Geometry
from oscar_radix.policy.base import LEVELS
from tests.kernels.attention_cases import check_decode, check_plan, check_write
from tests.kernels.extend_cases import check_extend, check_open

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = [Geometry(1, 8, 32, 128), Geometry(1, 4, 28, 128), Geometry(1, 3, 9, 64), Geometry(1, 2, 2, 64), Geometry(1, 2, 24, 128)]


@pytest.mark.parametrize("geometry", SHAPES, ids=str)
def test_decode(geometry):
    for parts, rotate in ((10, True), (35, False), (165, False)):
        check_decode(geometry, [1, 33, 700, 1500, 1280], parts, rotate, "cuda")
    for level in LEVELS:
        check_decode(geometry, [320, 95], 6, False, "cuda", levels=(level,))
    check_decode(geometry, [1, 33, 700, 1500, 1280], 35, True, "cuda", refined=(0,))


def test_plan():
    draw = random.Random(1)
    for batch, parts in ((1, 264), (3, 7), (64, 264), (300, 600), (17, 1024)):
        lengths = [draw.choice((1, 33, 700, draw.randrange(1, 70000))) for _ in range(batch)]
        pages_at = []
        for length in lengths:
            pages = -(-length // 32)
            pages_at.append([draw.randrange(pages // 4 + 1) for _ in range(4)] if draw.random() < 0.7 else [0] * 4)
        check_plan(lengths, pages_at, parts, "cuda")


@pytest.mark.parametrize("geometry", SHAPES, ids=str)
def test_extend(geometry):
    check_extend(geometry, [0, 64, 1003], [300, 31, 77], 1, "cuda")
    check_extend(geometry, [777, 1], [5, 200], 3, "cuda")
    check_extend(geometry, [40, 300], [2, 130], 16, "cuda")
    check_extend(geometry, [0, 64, 1003], [300, 31, 77], 1, "cuda", refined=(0,))
    check_extend(geometry, [777, 1], [5, 200], 3, "cuda", refined=(0,))


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="for Hopper")
@pytest.mark.parametrize("geometry", SHAPES, ids=str)
def test_extend_over_opened_rows(geometry):
    check_open(geometry, [1003, 64, 777], "cuda")
    check_extend(geometry, [0, 64, 1003], [300, 31, 77], 1, "cuda", scratch_rows=4096)
    check_extend(geometry, [777, 1], [5, 200], 3, "cuda", scratch_rows=256)
    check_extend(geometry, [130, 300, 0], [2, 130, 9], 16, "cuda", scratch_rows=128)
    check_open(geometry, [1003, 64, 777], "cuda", refined=(0,))
    check_extend(geometry, [777, 1], [5, 200], 3, "cuda", scratch_rows=256, refined=(0,))


@pytest.mark.parametrize("geometry", SHAPES[:3], ids=str)
@pytest.mark.parametrize("rotate", [True, False])
def test_write_and_seal(geometry, rotate):
    for tokens in (1, 65, 150):
        check_write(geometry, tokens, decode=False, rotate=rotate, device="cuda")
    check_write(geometry, 19, decode=True, rotate=rotate, device="cuda")
    check_write(geometry, 65, decode=False, rotate=rotate, device="cuda", refined=(0,))
