"""Mass of sampled forwards on the CPU path: probabilities of a dense softmax, on the right pages, heads and tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.attention.mass import MassSample, last_rows, page_table
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.policy.base import LEVELS
from oscar_radix.pool.mass import MassTable
from oscar_radix.sequence import Sequence
from tests.attention.test_read import KV_HEADS, LAYERS, Batch
from tests.helpers import page_count

PAGES = np.arange(1, 33)


def table_for(batch: Batch, pages: np.ndarray = PAGES) -> MassTable:
    """Room for every page; `pages` are tracked."""
    table = MassTable(batch.geometry, 33, 32, "cpu")
    assert table.track(pages).all()
    return table


def sample_forward(batch: Batch, table: MassTable, grows: list[int], decode: bool, queries: int = 1, nearest: int = 0) -> list[int]:
    """A forward whose last queries' mass is added; the sequences that took part."""
    batch.attention.sample = MassSample(batch.store, table, requests=4, queries=queries)
    before = list(batch.done)
    batch.forward(grows, decode)
    taking_part = [i for i, grow in enumerate(grows) if grow]
    sequences = [Sequence(batch.pages[i][: page_count(batch.done[i])], before[i], batch.done[i], decode) for i in taking_part]
    batch.attention.sample.add(*page_table(sequences), batch.scale, nearest)
    batch.attention.sample = None
    return taking_part


def dense_mass(batch: Batch, layer: int, i: int) -> torch.Tensor:
    """What the newest token of sequence i gives to each token, by a float64 softmax over rows decoded one by one: [Hkv, tokens]."""
    length = batch.done[i]
    pages = [batch.cached_page(layer, int(page))[0] for page in batch.pages[i][: page_count(length)]]
    key = torch.cat(pages, dim=1)[:, :length]
    query = batch.store.codec.queries_to_basis(layer, batch.rows[i][layer][0][length - 1 : length]).double()[0]
    scores = torch.einsum("hgd,hkd->hgk", query.view(KV_HEADS, -1, query.shape[-1]), key) * batch.scale
    return scores.softmax(-1).sum(dim=1)


def mass_of(batch: Batch, table: MassTable, layer: int, i: int) -> torch.Tensor:
    """Mass of sequence i's tokens: [Hkv, tokens]."""
    slots = table.slots[batch.pages[i][: page_count(batch.done[i])]]
    return table.values[layer, slots].transpose(0, 1).flatten(1)[:, : batch.done[i]]


@settings(max_examples=8)
@given(data=st.data(), group=st.integers(1, 8))
def test_decode_adds_the_softmax(data, group):
    """At random levels and ragged lengths; the whole is one for each query head."""
    batch = Batch(group, 64, count=2)
    batch.forward([data.draw(st.integers(1, 140), label="tokens") for _ in range(2)], decode=False)
    batch.set_levels(data.draw(st.lists(st.sampled_from(LEVELS), max_size=10), label="levels"))
    table = table_for(batch)
    for i in sample_forward(batch, table, [1, data.draw(st.integers(0, 1), label="second")], decode=True):
        for layer in range(LAYERS):
            mass = mass_of(batch, table, layer, i)
            torch.testing.assert_close(mass.double(), dense_mass(batch, layer, i), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mass.sum(1), torch.full((KV_HEADS,), float(group)), rtol=1e-4, atol=0)
        slots = table.slots[batch.pages[i][: page_count(batch.done[i])]]
        assert table.visits[slots].flatten()[: batch.done[i]].eq(1).all()
        assert not table.visits[slots].flatten()[batch.done[i] :].any(), "tokens that do not exist"


def test_readers_of_a_shared_page_add_up():
    """Two sequences on the same first pages, which is how the tree shares a prefix."""
    masses = []
    for readers in ([0], [1], [0, 1]):
        batch = Batch(group=2, head_dim=64, count=2)
        batch.forward([96, 96], decode=False)
        batch.pages[1] = np.concatenate([batch.pages[0][:3], batch.pages[1][3:]])
        batch.set_levels([8, 0, 4, 2, 0, 8])
        table = table_for(batch)
        sample_forward(batch, table, [1 if i in readers else 0 for i in range(2)], decode=True)
        shared = table.slots[batch.pages[0][:3]]
        masses.append(table.values[:, shared])
        assert table.visits[shared].eq(len(readers)).all()
    torch.testing.assert_close(masses[2], masses[0] + masses[1])


def test_only_pages_with_a_slot_get_mass():
    batch = Batch(group=2, head_dim=64, count=1)
    batch.forward([130], decode=False)
    full, some = table_for(batch), table_for(batch, batch.pages[0][[1, 3]])
    sample_forward(batch, some, [1], decode=True)
    batch.done[0] -= 1
    sample_forward(batch, full, [1], decode=True)
    pages = batch.pages[0][[1, 3]]
    assert torch.equal(some.values[:, some.slots[pages]], full.values[:, full.slots[pages]])
    assert torch.equal(some.visits[some.slots[pages]], full.visits[full.slots[pages]])
    some.values[:, some.slots[pages]] = 0
    assert not some.values.any()


def test_a_query_that_points_at_one_token_gives_it_everything():
    batch = Batch(group=2, head_dim=64, count=1)
    batch.forward([100], decode=False)
    batch.set_levels([2, 0, 4])
    token, layer, head = 43, 1, 1
    q = batch.rows[0][layer][0]
    towards = batch.cached_page(layer, int(batch.pages[0][1]))[0][head, token - PAGE_TOKENS]
    # The query that becomes the key itself in the basis.
    basis = batch.store.codec.query_basis[layer, head].double()
    q[100, 2 * head : 2 * head + 2] = (torch.linalg.solve(basis.T, towards) * 50).float()
    table = table_for(batch)
    sample_forward(batch, table, [1], decode=True)
    expected = torch.zeros(101)
    expected[token] = 2.0
    torch.testing.assert_close(mass_of(batch, table, layer, 0)[head], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("queries", [1, 4, 60])
def test_prefill_gives_the_mass_of_its_last_queries(queries):
    """Each query sees what stands before it; a chunk shorter than the sample counts only its own queries."""
    batch = Batch(group=3, head_dim=64, count=2)
    batch.forward([140, 33], decode=False)
    table = table_for(batch)
    sample_forward(batch, table, [70, 9], decode=False, queries=queries)
    for i, new in enumerate((70, 9)):
        counted = min(queries, new)
        mass = mass_of(batch, table, 0, i)
        # Own tokens are read back at int8 here, the log-sum-exp is of the exact ones.
        torch.testing.assert_close(mass.sum(1), torch.full((KV_HEADS,), 3.0 * counted), rtol=2e-2, atol=0)
        position = batch.done[i] - counted + torch.arange(counted)
        visits = (torch.arange(batch.done[i]) <= position[:, None]).sum(0)
        slots = table.slots[batch.pages[i][: page_count(batch.done[i])]]
        assert torch.equal(table.visits[slots].flatten()[: batch.done[i]], visits.float())


@pytest.mark.parametrize("nearest", [1, 32, 40, 200])
def test_the_nearest_tokens_can_be_left_out(nearest):
    batch = Batch(group=2, head_dim=64, count=1)
    batch.forward([130], decode=False)
    table = table_for(batch)
    sample_forward(batch, table, [1], decode=True, nearest=nearest)
    mass, seen = mass_of(batch, table, 0, 0), max(0, 131 - nearest)
    torch.testing.assert_close(mass[:, :seen].double(), dense_mass(batch, 0, 0)[:, :seen], rtol=1e-4, atol=1e-5)
    assert not mass[:, seen:].any()
    assert table.visits.sum() == seen


@pytest.mark.parametrize("queries", [1, 3, 8])
def test_a_batch_is_kept_at_once_as_one_by_one(queries):
    batch = Batch(group=2, head_dim=64, count=1)
    lengths = [5, 1, 9, 3]
    generator = torch.Generator().manual_seed(queries)
    query, lse = torch.randn(18, 4, 64, generator=generator), torch.randn(18, 4, generator=generator)
    samples = [MassSample(batch.store, table_for(batch), requests=4, queries=queries) for _ in range(2)]
    samples[0].keep_rows(1, query, lse, torch.from_numpy(last_rows(lengths, queries)))
    for request, (q, one) in enumerate(zip(query.split(lengths), lse.split(lengths), strict=True)):
        samples[1].keep(1, request, q, one)
    assert torch.equal(samples[0].lse, samples[1].lse)
    counted = samples[0].lse.isfinite()
    assert int(counted[1, :, :, 0].sum()) == sum(min(length, queries) for length in lengths)
    assert torch.equal(samples[0].query[counted], samples[1].query[counted])


def test_a_forward_that_is_not_sampled_keeps_nothing():
    batch = Batch(group=2, head_dim=64, count=1)
    assert batch.attention.sample is None
    batch.forward([70], decode=False)
    batch.forward([1], decode=True)


def test_sequences_beyond_the_sample_are_left_out():
    batch = Batch(group=2, head_dim=64, count=2)
    batch.forward([64, 64], decode=False)
    table = table_for(batch)
    batch.attention.sample = MassSample(batch.store, table, requests=1)
    batch.forward([1, 1], decode=True)
    sequences = [Sequence(batch.pages[i][:3], 64, 65, True) for i in range(2)]
    batch.attention.sample.add(*page_table(sequences), batch.scale)
    assert table.visits.sum() == 65
    assert not table.values[:, table.slots[batch.pages[1]]].any()


def test_padding_is_no_page():
    """Rows of a page table end in zeros; page 0 has no slot, and none can be asked for."""
    batch = Batch(group=2, head_dim=64, count=2)
    batch.forward([128, 33], decode=False)
    table = table_for(batch)
    sample_forward(batch, table, [1, 1], decode=True)
    assert table.slots[0] == -1
    torch.testing.assert_close(table.values.sum(dim=(1, 3)), torch.full((LAYERS, KV_HEADS), 4.0), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match="page 0 is padding"):
        table.track(np.array([3, 0]))
