"""The host's plan of an extend: every cached token in exactly one round, rounds that fit, and no more parts than help."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from oscar_radix.kernels.extend_plan import ROUND_TILE, extend_rounds, extend_splits, is_dense, plan_extend, query_blocks

LENGTHS = st.lists(st.integers(0, 3000), min_size=1, max_size=6)


@given(LENGTHS, st.integers(1, 10))
def test_rounds_cover_every_prefix_once_and_in_order(prefixes, tiles_at_once):
    rounds = extend_rounds(prefixes, tiles_at_once * ROUND_TILE)
    assert rounds.scratch_rows <= tiles_at_once * ROUND_TILE
    done, finished = [0] * len(prefixes), [0] * len(prefixes)
    for segments, tiles in zip(rounds.segments.tolist(), rounds.tiles, strict=True):
        opened = {}
        for row, (sequence, token) in enumerate(tiles.tolist()):
            opened[sequence, token] = row * ROUND_TILE
        for sequence, (first, end, row, last) in enumerate(segments):
            if end == first and not last:
                continue
            assert first == done[sequence]
            assert not finished[sequence]
            assert last == (end == prefixes[sequence])
            assert last or (end - first) % ROUND_TILE == 0
            for token in range(first, end, ROUND_TILE):
                assert opened.pop((sequence, token)) == row + token - first
            done[sequence], finished[sequence] = end, last
        assert not opened
    assert done == prefixes
    assert all(finished)


@given(LENGTHS, st.integers(1, 16))
def test_query_blocks_cover_the_new_tokens(lengths, group):
    request, first = query_blocks([length + 1 for length in lengths], group)
    covered = set()
    for sequence, start in zip(request.tolist(), first.tolist(), strict=True):
        for token in range(start, min(start + 128 // (1 << (group - 1).bit_length()), lengths[sequence] + 1)):
            assert (sequence, token) not in covered
            covered.add((sequence, token))
    assert len(covered) == sum(lengths) + len(lengths)


def test_few_queries_on_long_prefixes_are_split():
    assert extend_splits([102400], [2048], kv_heads=8, group=4, multiprocessors=132) == 1
    assert extend_splits([16384], [256], kv_heads=8, group=4, multiprocessors=132) == 2
    assert extend_splits([100], [8], kv_heads=8, group=4, multiprocessors=132) == 1


def test_prefixes_are_opened_once_where_enough_queries_read_them():
    assert is_dense([16384, 0], [2048, 1])
    assert is_dense([0], [5])
    assert not is_dense([16384], [32])
    few = plan_extend([16384, 64], [32, 2048], 8, 4, 128, 132, dense_exists=True)
    many = plan_extend([100000], [2048], 8, 4, 128, 132, dense_exists=True)
    portable = plan_extend([100000], [2048], 8, 4, 128, 132, dense_exists=False)
    assert few.rounds is None
    assert portable.rounds is None
    assert len(many.rounds.tiles) == 4
    moved = many.on([each.clone() for each in many.tensors()])
    assert all(torch.equal(a, b) for a, b in zip(moved.tensors(), many.tensors(), strict=True))
