"""Kernels of `mass` and `levels` against their specifications, on any device that runs them: a GPU, or Triton's interpreter.

`TRITON_INTERPRET=1 python -m tests.kernels.mass_levels_cases` runs tiny sizes on a CPU.
"""

from types import SimpleNamespace

import numpy as np
import torch

from oscar_radix.attention.mass import MassSample, page_keys
from oscar_radix.codec import get_recipe
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.kernels.keep_rows import keep_rows
from oscar_radix.policy import NonePolicy
from oscar_radix.policy.base import LEVELS
from oscar_radix.pool.hot_pool import PAGE_BLOCKS
from oscar_radix.pool.mass import MassTable
from oscar_radix.pool.store import KVStore
from tests.helpers import make_codec
from tests.kernels.warp_emulation import emulate

SCALE = 0.125


def random_store(
    geometry: Geometry, pages: int, seed: int, device: str = "cpu", levels: tuple[int, ...] = LEVELS, refined: tuple[int, ...] = ()
) -> KVStore:
    """Pages 1 .. `pages` with random records and hot rows at random levels; NaN scales wherever no page has a row."""
    draw = torch.Generator().manual_seed(seed)
    layout = get_recipe("tck").layout(geometry.head_dim)
    store = KVStore(geometry, layout, pages, (pages + 1) * PAGE_BLOCKS, NonePolicy(), 64, device, refined=len(refined))
    store.codec = make_codec("tck", geometry, device, refined)
    hot, base = store.hot, store.base

    def fill(buffer: torch.Tensor, low: int, high: int) -> None:
        buffer.copy_(torch.randint(low, high, buffer.shape, generator=draw))

    for buffer in (base.k_codes, base.v_codes, base.k_low, base.v_low):
        fill(buffer, 0, 256)
    for buffer in (hot.k_rows, hot.v_rows):
        fill(buffer, -127, 128)
    base.scales.copy_(torch.rand(base.scales.shape, generator=draw) * 0.2)
    hot.scales.copy_(torch.rand(hot.scales.shape, generator=draw) * 0.01)
    chosen = np.array(levels)[torch.randint(len(levels), (pages,), generator=draw).numpy()]
    for page in torch.randperm(pages, generator=draw).numpy() + 1:
        hot.acquire(int(page))
    for level in set(chosen.tolist()) - {PAGE_TOKENS}:
        members = np.flatnonzero(chosen == level) + 1
        if level:
            scores = torch.rand(len(members), geometry.layers, geometry.kv_heads, PAGE_TOKENS, generator=draw)
            hot.shrink(members, level, scores.to(device))
        else:
            hot.release(members)
    hot.sync_tables()
    whole = torch.from_numpy(hot.block_table[hot.levels == PAGE_TOKENS].flatten().astype(np.int64)).to(device)
    hot.row_numbers[:, whole] = 7  # row r of a whole page is token r, whatever this says
    poison = float("nan")
    base.scales[:, 0] = poison
    base.scales[:, torch.from_numpy(np.flatnonzero(hot.levels == PAGE_TOKENS)).to(device)] = poison
    unowned = np.setdiff1d(np.arange(hot.capacity), hot.block_table[hot.block_table >= 0])
    hot.scales[:, torch.from_numpy(unowned).to(device)] = poison
    return store


def sample_of(store: KVStore, table: MassTable, lengths: list[int], queries: int, seed: int, shared_pages: int):
    """A MassSample with random queries and their exact log-sum-exp over the cache; pages and lengths as `add` takes them. Sequences share
    their first pages."""
    draw = torch.Generator().manual_seed(seed)
    device, geometry = store.device, store.geometry
    sample = MassSample(store, table, len(lengths) + 1, queries)
    sample.query.copy_(torch.randn(sample.query.shape, generator=draw) * 6)
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    numbers = torch.randperm(store.pages, generator=draw).numpy() + 1
    pages = np.zeros((len(lengths), max(counts) + 3), dtype=np.int32)
    taken = shared_pages
    for row, count in zip(pages, counts, strict=True):
        own = max(0, count - shared_pages)
        row[:count] = np.concatenate([numbers[: min(count, shared_pages)], numbers[taken : taken + own]])
        taken += own
    assert taken <= store.pages, "the case needs more pages"
    for request, length in enumerate(lengths):
        position = length - queries + torch.arange(queries, device=device)
        for layer in range(geometry.layers):
            key = page_keys(store, layer, pages[request, : counts[request]].astype(np.int64)).transpose(0, 1).flatten(1, 2)[:, :length]
            scores = torch.einsum("thd,hkd->thk", sample.query[layer, request], key.repeat_interleave(geometry.group, 0)) * SCALE
            scores.masked_fill_((torch.arange(length, device=device) > position[:, None])[:, None], float("-inf"))
            sample.lse[layer, request] = scores.logsumexp(-1)
        sample.lse[:, request, position < 0] = float("inf")
    return sample, pages, np.array(lengths)


def compare_mass(
    geometry: Geometry,
    lengths: list[int],
    queries: int,
    nearest: int,
    seed: int,
    device: str,
    shared_pages: int = 1,
    refined: tuple[int, ...] = (),
) -> None:
    """The kernel adds what the specification adds, to a table that is not empty, tracking two pages of three."""
    pages = sum(-(-length // PAGE_TOKENS) for length in lengths) + 2
    store = random_store(geometry, pages, seed, device, refined=refined)
    tables = [MassTable(geometry, pages + 1, pages, device) for _ in range(2)]
    tracked = np.arange(1, pages + 1)[np.arange(pages) % 3 != seed % 3]
    for table in tables:
        table.track(tracked[::-1].copy())
        table.values += 0.5
        table.visits += 3.0
    sample, *sequences = sample_of(store, tables[0], lengths, queries, seed, shared_pages)
    # A query head that does not count, and a bad one.
    sample.lse[:, 0, -1, 0] = float("inf")
    sample.query[:, -2, -1, 1] = sample.lse[:, -2, -1, 1] = float("nan")
    sample.add_reference(*sequences, SCALE, nearest)
    sample.table = tables[1]
    sample.add_by_kernel(*sequences, SCALE, nearest)
    ours, theirs = tables[1].values - 0.5, tables[0].values - 0.5
    assert theirs.max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=1e-5)
    torch.testing.assert_close(tables[1].visits, tables[0].visits, rtol=0, atol=0)
    free = torch.tensor(tables[1].free.numbers, device=device)
    assert (tables[1].values[:, free] == 0.5).all(), "slots of no page"
    compare_sums(tables, store.hot.row_masks)


def compare_sums(tables: list[MassTable], row_masks: torch.Tensor) -> None:
    """Sums and decay of two equal tables, the second one's by the kernel."""
    from oscar_radix.kernels.mass_sums import sum_and_decay

    theirs, ours = tables
    ours.values.copy_(theirs.values)
    expected = torch.cat([theirs.slot_mass(), theirs.covered_mass(row_masks)])
    theirs.values *= 0.75
    sums = torch.zeros(ours.capacity + 1, device=ours.device)
    sum_and_decay(ours.values, row_masks, *ours._tracked(), sums, 0.75)
    free = torch.tensor(ours.free.numbers, device=ours.device)
    expected[free] = 0.0
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-4)
    ours.values[:, free] = theirs.values[:, free]
    assert torch.equal(ours.values, theirs.values)


def compare_kept(query_heads: int, dim: int, lengths: list[int], queries: int, seed: int, device: str) -> None:
    """`keep_queries` of fp16 queries into poisoned memory: what `keep_rows` keeps."""
    from oscar_radix.kernels.keep_queries import keep_queries

    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(sum(lengths), query_heads, dim, generator=draw).half().to(device)
    lse = torch.randn(sum(lengths), query_heads, generator=draw).to(device)
    geometry = Geometry(1, 1, query_heads, dim)
    sample = MassSample(SimpleNamespace(geometry=geometry, device=device), None, len(lengths), queries)
    rows = torch.from_numpy(sample.rows(lengths)).to(device)
    sample.keep_rows(0, query, lse, rows, factor=3.0)
    kept = torch.full_like(sample.query[0], float("nan")), torch.full_like(sample.lse[0], float("nan"))
    keep_queries(query, lse, rows, *kept, 3.0)
    assert torch.equal(kept[0], sample.query[0])
    assert torch.equal(kept[1], sample.lse[0])


def compare_levels(geometry: Geometry, level: int, pages: int, seed: int, device: str) -> None:
    """From every level above `level`, scores with ties, NaN and infinities: the same bytes in every buffer."""
    from oscar_radix.kernels.levels import keep_rows_kernel

    store = random_store(geometry, pages, seed, device, tuple(other for other in LEVELS if other > level))
    hot = store.hot
    draw = torch.Generator().manual_seed(seed + 1)
    chosen = np.sort(torch.randperm(pages, generator=draw).numpy()[: max(1, pages - 2)] + 1)[::-1].copy()
    scores = torch.randint(0, 12, (len(chosen), geometry.layers, geometry.kv_heads, PAGE_TOKENS), generator=draw).float()
    scores[scores == 0] = float("nan")
    scores[scores == 1] = float("-inf")
    scores[scores == 11] = float("inf")
    index, blocks = torch.from_numpy(chosen).to(device), torch.from_numpy(hot.block_table[chosen]).to(device)
    results = []
    for run in (keep_rows, keep_rows_kernel):
        buffers = [buffer.clone() for buffer in (hot.k_rows, hot.v_rows, hot.scales, hot.row_numbers, hot.row_masks)]
        run(tuple(buffers[:4]), buffers[4], index, blocks, scores.to(device), level)
        results.append(buffers)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def mend_interpreter() -> None:
    """Triton 3.6's interpreter turns a loop bound into an int in a way that numpy 2.4 refuses, and multiplies the bits of bf16 numbers."""
    from triton import language as tl
    from triton.runtime import interpreter

    patch, dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot

    def patch_and_mend(tensor, scope) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def wide(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return interpreter.TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter._patch_lang_tensor = patch_and_mend
    interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, wide(a), wide(b), *rest)


def main() -> None:
    from oscar_radix.kernels import decode_records, fine_codes, mass_records, record_words

    mend_interpreter()
    emulate(decode_records, mass_records, record_words, fine_codes)
    small = Geometry(2, 2, 6, 64)
    compare_kept(6, 64, [5, 1, 3], queries=4, seed=6, device="cpu")
    compare_levels(small, 2, pages=6, seed=0, device="cpu")
    compare_levels(small, 8, pages=3, seed=1, device="cpu")
    compare_mass(small, [150, 33], queries=1, nearest=0, seed=2, device="cpu")
    compare_mass(small, [70, 3, 64], queries=4, nearest=5, seed=3, device="cpu")
    compare_mass(Geometry(2, 2, 8, 128), [150, 33], queries=1, nearest=0, seed=4, device="cpu")
    compare_mass(Geometry(1, 1, 7, 128), [250, 64, 7], queries=1, nearest=33, seed=5, device="cpu")
    compare_mass(Geometry(2, 2, 4, 64), [100], queries=2, nearest=0, seed=6, device="cpu", refined=(1,))
    compare_mass(Geometry(2, 1, 4, 128), [100, 31], queries=1, nearest=0, seed=7, device="cpu", refined=(0,))
    print("done")


if __name__ == "__main__":
    main()
