"""Extend kernels against float64 attention, on any device that runs them; compare `attention_cases`, whose `main` runs these, too."""

import math

import torch

from oscar_radix.geometry import PAGE_TOKENS, Geometry
from tests.kernels.attention_cases import attention, error_of, layer_cache, low_bits, rows_of, sequences_of
from tests.kernels.mass_levels_cases import random_store


def check_extend(
    geometry: Geometry,
    prefixes: list[int],
    new: list[int],
    splits: int,
    device: str = "cpu",
    scratch_rows: int = 0,
    refined: tuple[int, ...] = (),
) -> None:
    """`extend` of a batch, or `extend_dense` with `scratch_rows`; prefixes end anywhere, also within a page."""
    from oscar_radix.kernels.extend import extend
    from oscar_radix.kernels.extend_dense import DenseBuffers, extend_dense
    from oscar_radix.kernels.extend_plan import ExtendPlan, extend_rounds, query_blocks

    count = sum(max(1, -(-prefix // PAGE_TOKENS)) for prefix in prefixes)
    store = random_store(geometry, count, seed=splits, device=device, refined=refined)
    table, pages = sequences_of(store, [max(1, prefix) for prefix in prefixes], device)
    draw = torch.Generator().manual_seed(2)
    dim, tokens = geometry.head_dim, sum(new)
    query = (torch.randn(tokens, geometry.query_heads, dim, generator=draw) * 0.3).half().to(device)
    rounds = extend_rounds(prefixes, scratch_rows) if scratch_rows else None
    scratch = rounds.scratch_rows if rounds else 0
    opened = tuple(torch.randn(scratch + tokens, geometry.kv_heads, dim, generator=draw).half().to(device) for _ in range(2))
    own = tuple(each[scratch:] for each in opened)
    for each in opened:
        each[:scratch] = math.nan
    mean = torch.randn(geometry.kv_heads, dim, generator=draw).to(device)
    to = lambda values: torch.tensor(values, device=device)  # noqa: E731
    starts = [sum(new[:request]) for request in range(len(new))]
    where = (table, to(list(range(len(new)))), to(prefixes), to(starts), to(new))
    plan = ExtendPlan(query_blocks(new, geometry.group), splits, rounds)
    plan = plan.on([each.to(device) for each in plan.tensors()])
    out, lse = torch.full_like(query, math.nan, dtype=torch.float32), torch.full(query.shape[:2], math.nan, device=device)
    cache = (layer_cache(store), store.hot.device_block_table, store.codec.key_parameters(0), mean, where)
    if rounds:
        buffers = DenseBuffers.empty(opened, plan, tuple(query.shape))
        for each in (buffers.carried, buffers.state, buffers.lse):
            if each is not None:
                each.fill_(math.nan)
        extend_dense(query, buffers, *cache, plan, out, lse, low_bits(store))
    else:
        extend(query, own, *cache, plan.blocks, splits, out, lse, low_bits(store))
    for request, (start, count, prefix) in enumerate(zip(starts, new, prefixes, strict=True)):
        span = slice(start, start + count)
        rows = rows_of(store, pages[request], prefix)
        key, value = (torch.cat([old, fresh[span].double().transpose(0, 1)], 1) for old, fresh in zip(rows, own, strict=True))
        # The query carries the softmax scale and log2(e).
        expected, expected_lse = attention(query[span], key, value, math.log(2), prefix)
        assert (lse[span] - expected_lse).abs().max() < 2e-2
        error = error_of(out[span], expected + mean.double().repeat_interleave(geometry.group, 0))
        assert error < 2e-3, f"{geometry}, {count} new tokens on {prefix} in {splits} parts: relative error {error:.1e}"


def check_open(geometry: Geometry, prefixes: list[int], device: str = "cpu", refined: tuple[int, ...] = ()) -> None:
    """`open_prefix` of whole prefixes, one after the other: rows of the prefix, then zeros up to the end of the last tile."""
    from oscar_radix.kernels.extend_plan import extend_rounds
    from oscar_radix.kernels.open_rows import open_prefix

    count = sum(-(-prefix // PAGE_TOKENS) for prefix in prefixes)
    store = random_store(geometry, count, seed=len(prefixes), device=device, refined=refined)
    table, pages = sequences_of(store, prefixes, device)
    rounds = extend_rounds(prefixes, sum(prefixes) + 128 * len(prefixes))
    shape = (rounds.scratch_rows + 5, geometry.kv_heads, geometry.head_dim)
    opened = tuple(torch.full(shape, math.nan, dtype=torch.float16, device=device) for _ in range(2))
    to = lambda values: torch.tensor(values, device=device)  # noqa: E731
    sequences = (table, to(list(range(len(prefixes)))), to(prefixes))
    codec = store.codec.key_parameters(0)
    open_prefix(rounds.tiles[0].to(device), layer_cache(store), store.hot.device_block_table, codec, sequences, opened, low_bits(store))
    for prefix, each, segment in zip(prefixes, pages, rounds.segments[0].tolist(), strict=True):
        for actual, expected in zip(opened, rows_of(store, each, prefix), strict=True):
            first = segment[2]
            assert error_of(actual[first : first + prefix], expected.transpose(0, 1)) < 2e-3
            assert not actual[first + prefix : first - (-prefix // 128) * 128].any()
    assert all(each[rounds.scratch_rows :].isnan().all() for each in opened)
