"""`TorchAttention.run` reads every row at the precision that the page tables say: against one dense softmax over rows decoded by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.attention.backend import TorchAttention
from oscar_radix.attention.plan import plan_forward
from oscar_radix.codec import RECIPES
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.policy import WindowPolicy
from oscar_radix.policy.base import LEVELS
from oscar_radix.pool.free_list import FreeList
from oscar_radix.sequence import Sequence
from tests.helpers import make_store, page_count, random_qkv

LAYERS, KV_HEADS = 2, 2
TOLERANCE = 1e-5
"""float32 sums in another order, relative to the largest output."""


class ChoosingPolicy(WindowPolicy):
    """Keeps pages whole by itself; when it is told to shrink one, different rows for every (layer, head)."""

    def choose_rows(self, page, level, layers, kv_heads, page_tokens):
        generator = torch.Generator().manual_seed(page)
        return torch.rand(layers, kv_heads, page_tokens, generator=generator).argsort(-1)[..., :level].sort(-1).values


class Batch:
    """Sequences in one store: q, k, v of all tokens in float32, so that outputs are not rounded to bf16."""

    def __init__(self, group: int, head_dim: int, count: int, recipe: str = "tck", seed: int = 0):
        self.geometry = Geometry(LAYERS, KV_HEADS, KV_HEADS * group, head_dim)
        self.store = make_store(pages=32, hot_pages=32, recent_tokens=32, recipe=recipe, geometry=self.geometry, refined=(1,))
        self.store.residency.policy = ChoosingPolicy()
        self.attention = TorchAttention(self.store)
        self.scale = 1 / math.sqrt(head_dim)
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randperm(32, generator=generator).numpy() + 1
        self.pages = np.array_split(numbers, count)
        for pages in self.pages:
            self.store.allocate(pages)
        tokens = len(self.pages[-1]) * PAGE_TOKENS
        self.rows = [[[t.float() for t in random_qkv(self.geometry, tokens, generator)] for _ in range(LAYERS)] for _ in self.pages]
        self.done = [0] * count

    def forward(self, grows: list[int], decode: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(ours, reference) by layer, [T, Hq, D]; sequences that grow by 0 sit the forward out."""
        sequences, spans = [], []
        for i, grow in enumerate(grows):
            if grow:
                end = self.done[i] + grow
                sequences.append(Sequence(self.pages[i][: page_count(end)], self.done[i], end, decode))
                spans.append((i, self.done[i], end))
                self.done[i] = end
        plan = plan_forward(self.store, sequences)
        ours, reference = [], []
        for layer in range(LAYERS):
            q, k, v = (torch.cat([self.rows[i][layer][part][start:end] for i, start, end in spans]) for part in range(3))
            ours.append(self.attention.run(layer, q, k, v, plan, self.scale))
            reference.append(torch.cat([self.dense(layer, *span, decode) for span in spans]))
        return ours, reference

    def dense(self, layer: int, i: int, start: int, end: int, decode: bool) -> torch.Tensor:
        """One float64 softmax over all readable rows: cached ones decoded one by one, the own chunk as it was computed."""
        codec = self.store.codec
        q, k, v = (part[start:end] for part in self.rows[i][layer])
        readable = end if decode else start
        rows = [self.cached_page(layer, int(page)) for page in self.pages[i][: page_count(readable)]]
        keys = [key[:, t] for key, _ in rows for t in range(PAGE_TOKENS)][:readable]
        values = [value[:, t] for _, value in rows for t in range(PAGE_TOKENS)][:readable]
        if not decode:
            keys.extend(codec.keys_to_basis(layer, k).double())
            values.extend(codec.values_to_basis(layer, v).double())
        key, value = torch.stack(keys), torch.stack(values)  # [T, Hkv, D]
        group = self.geometry.group
        query = codec.queries_to_basis(layer, q).double()
        scores = torch.einsum("qhd,thd->qht", query, key.repeat_interleave(group, 1)) * self.scale
        if not decode:
            position = torch.arange(start, end)
            scores.masked_fill_((torch.arange(len(key))[None] > position[:, None])[:, None], float("-inf"))
        out = torch.einsum("qht,thd->qhd", scores.softmax(-1), value.repeat_interleave(group, 1))
        return codec.output_from_basis(layer, out)

    def cached_page(self, layer: int, page: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a page, float64 [Hkv, 32, D]: each token's hot row where one of the page's blocks has it, else its record."""
        store, hot = self.store, self.store.hot
        key, value = (rows[0].double() for rows in store.codec.open(layer, *store.records(layer, torch.tensor([page]))))
        for block in hot.block_table[page][hot.block_table[page] >= 0].tolist():
            for head in range(KV_HEADS):
                for place in range(2):
                    token = int(hot.row_numbers[layer, block, head, place])
                    k_scale, v_scale = hot.scales[layer, block, head, place].double()
                    key[head, token] = hot.k_rows[layer, block, head, place].double() * k_scale
                    value[head, token] = hot.v_rows[layer, block, head, place].double() * v_scale
        return key, value

    def set_levels(self, levels: list[int]) -> None:
        """Lower the sealed pages, one after another, to these levels; whole pages may go to any level, others only to 0."""
        for page, level in zip(np.flatnonzero(self.store.table.sealed).tolist(), levels, strict=False):
            held = self.store.hot.levels[page]
            if level < held and (held == PAGE_TOKENS or level == 0):
                self.store.residency.demote(page, level)


def check(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    for layer, (one, other) in enumerate(zip(ours, reference, strict=True)):
        assert torch.isfinite(one).all()
        assert (one - other).abs().max() <= TOLERANCE * other.abs().max().clamp(min=1), f"layer {layer}"


@settings(max_examples=25, deadline=None)
@given(data=st.data(), group=st.integers(1, 8), head_dim=st.sampled_from([64, 64, 128]))
def test_mixed_levels_and_ragged_batches(data, group, head_dim):
    """Prefill, lower pages to random levels, then extend or decode: a few times over."""
    count = data.draw(st.integers(1, 3), label="sequences")
    batch = Batch(group, head_dim, count)
    for _ in range(3):
        decode = min(batch.done) > 0 and data.draw(st.booleans(), label="decode")
        grows = [1 if decode else data.draw(st.integers(0, 90), label="new tokens") for _ in range(count)]
        if any(grows):
            check(*batch.forward(grows, decode))
        batch.set_levels(data.draw(st.lists(st.sampled_from(LEVELS), max_size=12), label="levels"))


@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("level", LEVELS)
def test_every_recipe_at_every_level(recipe, level):
    batch = Batch(group=3, head_dim=64, count=1, recipe=recipe)
    check(*batch.forward([130], decode=False))
    batch.set_levels([level] * 4)
    assert (batch.store.hot.levels[batch.pages[0][:4]] == level).all()
    check(*batch.forward([1], decode=True))
    check(*batch.forward([40], decode=False))


def test_levels_matter():
    """The reference is not blind: the same step at another level gives another output."""
    outputs = []
    for level in LEVELS:
        batch = Batch(group=1, head_dim=64, count=1)
        batch.forward([130], decode=False)
        batch.set_levels([level] * 4)
        outputs.append(batch.forward([1], decode=True)[0][0])
    for i, one in enumerate(outputs):
        for other in outputs[i + 1 :]:
            assert (one - other).abs().max() > 1e-3


def test_more_rows_are_closer_to_exact_attention():
    errors = {}
    for level in LEVELS:
        batch = Batch(group=1, head_dim=64, count=1)
        batch.forward([225], decode=False)
        batch.set_levels([level] * 7)
        ours = batch.forward([1], decode=True)[0][0]
        q, k, v = (part[:226] for part in batch.rows[0][0])
        weights = (torch.einsum("qhd,thd->qht", q[-1:].double(), k.double()) * batch.scale).softmax(-1)
        exact = torch.einsum("qht,thd->qhd", weights, v.double())
        errors[level] = float((ours - exact).square().mean())
    assert errors[32] < 1e-2 * errors[0]
    assert errors[8] < errors[0]


def test_after_a_flush_old_hot_rows_hide_nothing():
    """Pages that were hot before `clear` and are read from their records alone afterwards."""
    batch = Batch(group=2, head_dim=64, count=2)
    batch.forward([130, 90], decode=False)
    batch.store.clear()
    batch.store.hot.free = FreeList(np.arange(32))  # room for two pages: the others are sealed without hot rows
    batch.done = [0, 0]
    batch.store.allocate(batch.pages[0])
    batch.forward([130, 0], decode=False)
    assert batch.store.residency.sealed_without_hot_rows > 0
    batch.set_levels([4] * 4)
    check(*batch.forward([1, 0], decode=True))


# Bad rows ------------------------------------------------------------------------------------------------------------


def poisoned_batch(value: float, part: int, token: int) -> tuple[Batch, Batch]:
    """Two equal batches; in the second, one element of K (part 1) or V (part 2) of `token`, KV head 1, is NaN or Inf."""
    clean, bad = Batch(group=2, head_dim=64, count=2), Batch(group=2, head_dim=64, count=2)
    for layer in range(LAYERS):
        bad.rows[0][layer][part][token, 1, 5] = value
    return clean, bad


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("part", [1, 2])
def test_a_bad_row_is_counted_stored_as_zeros_and_spreads_nowhere(value, part):
    token = 40
    clean, bad = poisoned_batch(value, part, token)
    outputs = {}
    for batch in (clean, bad):
        outputs[batch] = [batch.forward([70, 50], decode=False)[0], batch.forward([1, 1], decode=True)[0]]
    assert int(clean.store.bad_rows) == 0
    assert int(bad.store.bad_rows) == LAYERS, "one row of one head in every layer"
    stored = bad.cached_page(0, int(bad.pages[0][1]))[part - 1]
    assert not stored[1, token - PAGE_TOKENS].any(), "int8 row of head 1"
    for ours, theirs in zip(outputs[clean], outputs[bad], strict=True):
        for layer in range(LAYERS):
            assert torch.isfinite(theirs[layer]).all()
            assert torch.equal(ours[layer][:, :2], theirs[layer][:, :2]), "query heads of KV head 0"
    assert torch.equal(outputs[clean][0][0][:token], outputs[bad][0][0][:token]), "queries before the bad token"
    assert torch.equal(outputs[clean][0][0][70:], outputs[bad][0][0][70:]), "the other sequence, prefill"
    assert torch.equal(outputs[clean][1][0][1:], outputs[bad][1][0][1:]), "the other sequence, decode"


def test_a_bad_row_changes_no_other_row_of_its_record():
    clean, bad = poisoned_batch(float("nan"), 1, 40)
    for batch in (clean, bad):
        batch.forward([70, 0], decode=False)
    page = int(clean.pages[0][1])
    for layer in range(LAYERS):
        ours, theirs = ([part[0] for part in batch.store.records(layer, torch.tensor([page]))] for batch in (clean, bad))
        others = torch.arange(PAGE_TOKENS) != 40 - PAGE_TOKENS
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one[:, others], other[:, others])
            assert torch.equal(one[0], other[0])
        opened, _ = bad.store.codec.open(layer, *bad.store.records(layer, torch.tensor([page])))
        assert not opened[0, 1, 40 - PAGE_TOKENS].any(), "the record of a zero row is a zero row"
