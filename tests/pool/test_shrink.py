"""Shrinking many pages at once: the rows of largest score stay, with their bytes, from any level to any lower one."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.free_list import FreeList
from oscar_radix.pool.hot_pool import PAGE_BLOCKS, HotPool
from tests.helpers import GEOMETRY
from tests.pool.test_hot_pool import check_rows, fill, keep, random_page

PAGES = 6


def full_pool(seed: int) -> tuple[HotPool, dict[int, list]]:
    """Six whole pages on interleaved blocks, and their rows."""
    pool = HotPool(GEOMETRY, pages=PAGES + 1, blocks=(PAGES + 1) * PAGE_BLOCKS, device="cpu")
    pool.free = FreeList(np.random.default_rng(seed).permutation(pool.capacity))
    rows = {}
    for page in range(1, PAGES + 1):
        pool.acquire(page)
        rows[page] = random_page(seed * 100 + page)
        fill(pool, page, rows[page])
    return pool, rows


def best(scores: np.ndarray, held: np.ndarray, level: int) -> np.ndarray:
    """The `level` of `held` [r] token numbers with the largest score; ties to the lower; ascending."""
    by_score = sorted(held.tolist(), key=lambda token: (-scores[token], token))
    return np.sort(by_score[:level])


def random_scores(seed: int, count: int) -> torch.Tensor:
    """Few distinct values: ties in every head."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 9, (count, GEOMETRY.layers, GEOMETRY.kv_heads, PAGE_TOKENS), generator=generator).float()


@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_any_way_down(data, seed):
    """A few batches of pages, each to a lower level; every page against a reference that sorts token by token."""
    pool, rows = full_pool(seed % 1000)
    chosen = {page: np.tile(np.arange(PAGE_TOKENS), (GEOMETRY.layers, GEOMETRY.kv_heads, 1)) for page in rows}
    for turn in range(3):
        level = data.draw(st.sampled_from([2, 4, 8, 30]), label="level")
        able = [page for page in rows if pool.levels[page] > level]
        if not able:
            continue
        pages = data.draw(st.lists(st.sampled_from(able), unique=True, min_size=1), label="pages")
        scores = random_scores(seed + turn, len(pages))
        pool.shrink(np.array(pages), level, scores)
        for page, score in zip(pages, scores.numpy(), strict=True):
            chosen[page] = np.array(
                [[best(score[layer, head], chosen[page][layer, head], level) for head in range(GEOMETRY.kv_heads)]
                 for layer in range(GEOMETRY.layers)]
            )  # fmt: skip
        pool.check_integrity()
    for page in rows:
        assert pool.levels[page] == chosen[page].shape[-1]
        check_rows(pool, page, rows[page], torch.from_numpy(chosen[page]))
    held = sum(int(level) // 2 for level in pool.levels)
    assert pool.free_blocks == pool.capacity - held
    for page in rows:
        pool.release(page)
    assert pool.free_blocks == pool.capacity
    pool.check_integrity()


def test_freed_blocks_serve_other_pages():
    pool, rows = full_pool(1)
    pool.shrink(np.array([1, 2, 3]), 2, random_scores(1, 3))
    kept = pool.row_masks[:, [1, 2, 3]].clone()
    pool.release(6)
    assert pool.acquire(6)
    fill(pool, 6, random_page(9))
    pool.sync_tables()
    assert torch.equal(pool.row_masks[:, [1, 2, 3]], kept)
    check_rows(pool, 4, rows[4], torch.arange(PAGE_TOKENS).expand(GEOMETRY.layers, GEOMETRY.kv_heads, -1))
    pool.check_integrity()


def test_scores_that_are_no_numbers_come_last_but_rows_are_kept():
    pool, rows = full_pool(2)
    scores = torch.full((1, GEOMETRY.layers, GEOMETRY.kv_heads, PAGE_TOKENS), float("nan"))
    scores[..., 31] = float("-inf")
    scores[..., 17] = -5.0
    pool.shrink(np.array([3]), 4, scores)
    check_rows(pool, 3, rows[3], torch.tensor([0, 1, 2, 17]).expand(GEOMETRY.layers, GEOMETRY.kv_heads, -1))


def test_one_page_by_its_rows_from_level_to_level():
    pool, rows = full_pool(3)
    eight = torch.arange(1, 32, 4).expand(GEOMETRY.layers, GEOMETRY.kv_heads, -1)
    keep(pool, 2, eight)
    keep(pool, 2, eight[..., [2, 7]])
    assert pool.levels[2] == 2
    check_rows(pool, 2, rows[2], eight[..., [2, 7]])


@pytest.mark.parametrize("level", [0, 3, 8, 32])
def test_a_batch_with_a_page_that_holds_too_little_changes_nothing(level):
    pool, _ = full_pool(4)
    pool.shrink(np.array([5]), 8, random_scores(4, 1))
    before = pool.block_table.copy(), pool.levels.copy(), pool.k_rows.clone(), pool.free_blocks
    with pytest.raises(RuntimeError, match=f"is at level .*; cannot keep {level} of its rows"):
        pool.shrink(np.array([1, 5, 2]), level, random_scores(5, 3))
    assert np.array_equal(before[0], pool.block_table)
    assert np.array_equal(before[1], pool.levels)
    assert torch.equal(before[2], pool.k_rows)
    assert before[3] == pool.free_blocks
