"""Blocks have one owner; rows and their numbers follow a page through acquire, shrink, move and release."""

import numpy as np
import pytest
import torch

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.hot_pool import BLOCK_ROWS, PAGE_BLOCKS, HotPool, Rows
from tests.helpers import GEOMETRY

HEADS, DIM, LAYERS = GEOMETRY.kv_heads, GEOMETRY.head_dim, GEOMETRY.layers


@pytest.fixture
def pool() -> HotPool:
    """Room for three whole pages of eight."""
    return HotPool(GEOMETRY, pages=8, blocks=3 * PAGE_BLOCKS, device="cpu")


def random_page(seed: int) -> list[Rows]:
    """The rows of one page by layer: each tensor [32, Hkv, ...]."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    def scales() -> torch.Tensor:
        return torch.rand(PAGE_TOKENS, HEADS, generator=generator).half()

    return [
        Rows(integers(PAGE_TOKENS, HEADS, DIM), scales(), integers(PAGE_TOKENS, HEADS, DIM), scales()) for _ in range(LAYERS)
    ]


def fill(pool: HotPool, page: int, rows: list[Rows]) -> None:
    """Write all 32 rows of an acquired page."""
    token = torch.arange(PAGE_TOKENS)
    blocks = torch.from_numpy(pool.block_table[page].astype(np.int64))[token // BLOCK_ROWS]
    for layer, layer_rows in enumerate(rows):
        pool.write(layer, blocks, token % BLOCK_ROWS, layer_rows)


def held(pool: HotPool, page: int, layer: int, head: int) -> dict[int, tuple[torch.Tensor, ...]]:
    """Token number -> (k, k_scale, v, v_scale) of the rows that a page holds, read block by block."""
    found = {}
    for block in pool.block_table[page][pool.block_table[page] >= 0].tolist():
        for place in range(BLOCK_ROWS):
            at = (layer, block, head, place)
            k_scale, v_scale = pool.scales[at]
            found[int(pool.row_numbers[at])] = (pool.k_rows[at], k_scale, pool.v_rows[at], v_scale)
    return found


def check_rows(pool: HotPool, page: int, rows: list[Rows], chosen: torch.Tensor) -> None:
    """`page` holds exactly the rows [layers, Hkv, r] `chosen`, each with its own contents, and its masks name them."""
    pool.sync_tables()
    for layer in range(LAYERS):
        for head in range(HEADS):
            found = held(pool, page, layer, head)
            expected = chosen[layer, head].tolist()
            assert sorted(found) == expected
            mask = int(pool.row_masks[layer, page, head]) & 0xFFFFFFFF
            assert [bit for bit in range(PAGE_TOKENS) if mask >> bit & 1] == expected
            for token, parts in found.items():
                theirs = (rows[layer].k, rows[layer].k_scale, rows[layer].v, rows[layer].v_scale)
                assert all(torch.equal(ours, other[token, head]) for ours, other in zip(parts, theirs, strict=True))


ALL_ROWS = torch.arange(PAGE_TOKENS).expand(LAYERS, HEADS, -1)


def some_rows(count: int) -> torch.Tensor:
    """Other rows for every (layer, head), ascending."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(LAYERS, HEADS, PAGE_TOKENS, generator=generator).argsort(-1)[..., :count].sort(-1).values


def keep(pool: HotPool, page: int, rows: torch.Tensor) -> None:
    """Lower a page to the rows of these token numbers, int64 [layers, Hkv, r]."""
    scores = torch.zeros(1, *rows.shape[:2], PAGE_TOKENS).scatter_(-1, rows[None], 1.0)
    pool.shrink(np.array([page]), rows.shape[-1], scores)


def test_a_page_takes_sixteen_blocks_and_gives_them_back(pool):
    assert pool.acquire(5)
    assert pool.levels[5] == PAGE_TOKENS
    assert pool.free_blocks == 2 * PAGE_BLOCKS
    pool.check_integrity()
    pool.release(5)
    assert pool.levels[5] == 0
    assert pool.free_blocks == 3 * PAGE_BLOCKS
    pool.check_integrity()


def test_acquire_says_no_and_changes_nothing_when_blocks_are_short(pool):
    for page in (1, 2, 3):
        assert pool.acquire(page)
    assert not pool.acquire(4)
    assert pool.levels[4] == 0
    assert (pool.block_table[4] == -1).all()
    keep(pool, 1, some_rows(4))
    assert not pool.acquire(4), "14 blocks are free, a page takes 16"
    assert pool.free_blocks == 14
    pool.check_integrity()


def test_acquire_twice_is_an_error(pool):
    pool.acquire(1)
    with pytest.raises(RuntimeError, match="page 1 already holds 32 hot rows"):
        pool.acquire(1)


def test_a_pool_smaller_than_a_page_is_refused():
    with pytest.raises(ValueError, match="the hot pool holds 15 blocks; one fresh page takes 16"):
        HotPool(GEOMETRY, pages=4, blocks=15, device="cpu")


def test_rows_come_back_in_token_order(pool):
    rows = random_page(1)
    pool.acquire(2)
    fill(pool, 2, rows)
    check_rows(pool, 2, rows, ALL_ROWS)
    read = pool.read(1, pool.blocks_of(np.array([2]), PAGE_TOKENS))
    assert torch.equal(read.k[0], rows[1].k.transpose(0, 1))
    assert torch.equal(read.v_scale[0], rows[1].v_scale.transpose(0, 1))


@pytest.mark.parametrize("kept", [2, 4, 8, 30])
def test_shrink_keeps_the_chosen_rows_of_every_layer_and_head(pool, kept):
    rows, other = random_page(1), random_page(2)
    for page, contents in ((1, other), (2, rows)):
        pool.acquire(page)
        fill(pool, page, contents)
    keep(pool, 2, some_rows(kept))
    assert pool.levels[2] == kept
    assert pool.free_blocks == 2 * PAGE_BLOCKS - kept // BLOCK_ROWS
    check_rows(pool, 2, rows, some_rows(kept))
    check_rows(pool, 1, other, ALL_ROWS)
    pool.check_integrity()
    read = pool.read(0, pool.blocks_of(np.array([2]), kept))
    assert torch.equal(read.k[0, 1], rows[0].k[some_rows(kept)[0, 1], 1])
    pool.release(2)
    pool.check_integrity()


@pytest.mark.parametrize("kept", [0, 3, 32])
def test_shrink_to_odd_none_or_all_rows_is_an_error(pool, kept):
    pool.acquire(1)
    with pytest.raises(RuntimeError, match=f"page 1 is at level 32; cannot keep {kept} of its rows"):
        keep(pool, 1, some_rows(kept))


def test_shrink_of_a_page_that_is_not_whole_is_an_error(pool):
    with pytest.raises(RuntimeError, match="page 1 is at level 0; cannot keep 4"):
        keep(pool, 1, some_rows(4))


@pytest.mark.parametrize("level", [4, 32])
def test_move_hands_rows_over(pool, level):
    rows = random_page(3)
    pool.acquire(1)
    fill(pool, 1, rows)
    if level < PAGE_TOKENS:
        keep(pool, 1, some_rows(level))
    pool.move(1, 6)
    assert pool.levels[[1, 6]].tolist() == [0, level]
    check_rows(pool, 6, rows, ALL_ROWS if level == PAGE_TOKENS else some_rows(level))
    assert not pool.row_masks[:, 1].any(), "nothing of page 1 is hot any more"
    pool.check_integrity()


def test_move_onto_a_hot_page_is_an_error(pool):
    pool.acquire(1)
    pool.acquire(2)
    with pytest.raises(RuntimeError, match="page 2 already holds 32 hot rows; cannot take those of page 1"):
        pool.move(1, 2)


def test_masks_follow_release_and_clear(pool):
    for page in (1, 2):
        pool.acquire(page)
    keep(pool, 1, some_rows(4))
    pool.release(1)
    pool.sync_tables()
    assert not pool.row_masks[:, 1].any()
    assert (pool.row_masks[:, 2] == -1).all(), "all 32 bits"
    pool.clear()
    assert not pool.row_masks.any()
    assert pool.free_blocks == pool.capacity
    pool.check_integrity()


# Planted faults ------------------------------------------------------------------------------------------------------


def test_integrity_sees_a_lost_block(pool):
    pool.acquire(1)
    pool.free.take(1)
    with pytest.raises(RuntimeError, match=r"1 of 48 hot blocks have \[0\] owners, not 1"):
        pool.check_integrity()


def test_integrity_sees_a_block_of_two_pages(pool):
    pool.acquire(1)
    pool.acquire(2)
    pool.block_table[2, 3] = pool.block_table[1, 3]
    with pytest.raises(RuntimeError, match=r"2 of 48 hot blocks have \[.*\] owners, not 1"):
        pool.check_integrity()


def test_integrity_sees_a_block_that_is_free_and_owned(pool):
    pool.acquire(1)
    pool.free.give_back(pool.block_table[1, :1])
    with pytest.raises(RuntimeError, match=r"1 of 48 hot blocks have \[2\] owners, not 1"):
        pool.check_integrity()


def test_integrity_sees_a_wrong_level(pool):
    pool.acquire(3)
    pool.levels[3] = 8
    with pytest.raises(RuntimeError, match="page 3 is at level 8 but owns 16 hot blocks"):
        pool.check_integrity()


# Bytes ---------------------------------------------------------------------------------------------------------------


def test_bytes_are_what_the_formulas_say(pool):
    assert pool.row_bytes == 3 * PAGE_BLOCKS * HotPool.block_bytes(GEOMETRY)
    assert pool.table_bytes == 8 * HotPool.table_bytes_per_page(GEOMETRY)
