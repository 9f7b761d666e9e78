"""Attention mass over the radix tree: it lands on what readers looked at, and follows pages through splits, frees and reuse."""

import numpy as np
import pytest
import torch

from oscar_radix.attention.backend import TorchAttention
from oscar_radix.attention.plan import ForwardPlan
from oscar_radix.attention.sampling import DECODE_INTERVAL, NEAREST, PREFILL_QUERIES, MassSampling, _queries
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.sequence import Sequence
from tests.attention.test_cache_on_off import toy_rows
from tests.attention.test_read import Batch
from tests.helpers import make_store
from tests.mini_server import MiniServer, Request, tokens_of

GEOMETRY = Geometry(layers=2, kv_heads=2, query_heads=4, head_dim=64)
SCALE = 0.125
LAYER, HEAD = 1, 1


class Readers:
    """Requests over a MiniServer; queries of a forward can be made to look at one token of their sequence."""

    def __init__(self, hot_pages: int = 40, pages: int = 60):
        self.store = make_store(pages, hot_pages, "attention", recent_tokens=64, geometry=GEOMETRY, policy_interval=1000)
        self.server = MiniServer(self.store)
        self.attention = TorchAttention(self.store)
        self.sampling = MassSampling(self.store)
        self.sampling.scale = SCALE
        self.table = self.store.mass.table

    def read(self, prompt: list[int], look_at: int | None = None, answer: int = 0) -> np.ndarray:
        """A whole request; returns its pages. `look_at`: where queries of (LAYER, HEAD) look."""
        request = self.server.start(prompt)
        start = request.kv_committed_len
        plan = self.server.prefill([(request, request.prompt_left)])
        self._run(request, start, plan, look_at, decode=False)
        self.server.end_of_prefill([request])
        for step in range(answer):
            start = request.kv_committed_len
            self._run(request, start, self.server.decode([request], [500 + step]), look_at, decode=True)
        pages = self.server.pages_of(request)
        self.server.finish(request)
        self.server.tree.check_integrity()
        return pages

    def _run(self, request: Request, start: int, plan: ForwardPlan, look_at: int | None, decode: bool) -> None:
        end = request.kv_committed_len
        sequence = Sequence(self.server.pages_of(request), start, end, decode)
        self.attention.sample = self.sampling.begin([sequence] if self.sampling.wanted(decode) else [])
        rows = [toy_rows(int(request.tokens[at]), at) for at in range(start, end)]
        for layer in range(GEOMETRY.layers):
            q, k, v = (torch.cat([row[layer][part] for row in rows]).float() for part in range(3))
            if look_at is not None and layer == LAYER:
                q[:, 2 * HEAD : 2 * HEAD + 2] = self._looking(request.tokens[:end].tolist(), look_at)
            self.attention.run(layer, q, k, v, plan, SCALE)
        self.attention.sample = None
        self.sampling.end()

    def _looking(self, tokens: list[int], look_at: int) -> torch.Tensor:
        """A query [D] whose score at one token stands 60 above zero and far above all others, whatever the basis: white among its keys."""
        rows = torch.cat([toy_rows(token, at)[LAYER][1] for at, token in enumerate(tokens)]).float()
        keys = self.store.codec.keys_to_basis(LAYER, rows)[:, HEAD].double()
        looking = torch.linalg.solve(keys.T @ keys, keys[look_at])
        looking *= 60 / SCALE / (looking @ keys[look_at])
        return torch.linalg.solve(self.store.codec.query_basis[LAYER, HEAD].double().T, looking).float()

    def mass(self, page: int) -> torch.Tensor:
        """[32], what the looking head gave to each token of a page."""
        assert self.table.slots[page] >= 0
        return self.table.values[LAYER, self.table.slots[page], HEAD]


def test_a_prompts_last_queries_seed_the_page_at_which_they_look():
    readers = Readers()
    pages = readers.read(tokens_of([1, 2, 3, 4, 5, 6], tail=7), look_at=78)
    expected = torch.zeros(PAGE_TOKENS)
    expected[78 % PAGE_TOKENS] = PREFILL_QUERIES * 2
    torch.testing.assert_close(readers.mass(pages[2]), expected, rtol=1e-2, atol=1e-2)
    assert readers.mass(pages[1]).sum() < 1e-2


def test_the_rows_that_a_prompts_own_queries_read_stay_when_it_leaves_the_window():
    """The prompt's pages settle on the next forward, with the mass of its own queries, before any other reader came."""
    readers = Readers()
    pages = readers.read(tokens_of([1, 2, 3, 4, 5, 6], tail=7), look_at=77, answer=2)
    readers.read(tokens_of([9], tail=3))
    assert readers.store.hot.levels[pages[:6]].tolist() == [32, 32, 8, 8, 32, 32], "sinks and the end stay"
    mask = int(readers.store.hot.row_masks[LAYER, pages[2], HEAD])
    assert (mask >> 77 % PAGE_TOKENS) & 1
    readers.store.residency.demote(int(pages[2]), 2)
    assert (int(readers.store.hot.row_masks[LAYER, pages[2], HEAD]) >> 77 % PAGE_TOKENS) & 1


def test_mass_survives_a_split_and_adds_up_over_readers():
    readers = Readers()
    first = readers.read(tokens_of([1, 2, 3, 4, 5, 6], tail=7), look_at=40)
    before = readers.mass(first[1]).clone()
    second = readers.read(tokens_of([1, 2, 3, 7, 8], tail=40), look_at=45)  # branches off within the first one's node
    assert np.array_equal(first[:3], second[:3])
    assert not np.intersect1d(first[3:6], second[3:]).size
    after = readers.mass(first[1])
    assert after[40 % PAGE_TOKENS] == pytest.approx(float(before[40 % PAGE_TOKENS]), rel=1e-2)
    assert after[45 % PAGE_TOKENS] == pytest.approx(PREFILL_QUERIES * 2, rel=1e-2)


def test_a_page_that_is_evicted_and_used_again_starts_without_mass():
    readers = Readers(pages=14, hot_pages=14)
    first = readers.read(tokens_of([1, 2, 3, 4, 5, 6], tail=7), look_at=77)
    others = [readers.read(tokens_of([block + i for i in range(6)], tail=7)) for block in (20, 30)]
    reused = np.intersect1d(first[:6], np.concatenate(others))
    assert reused.size, "the pool is small"
    for page in reused.tolist():
        if readers.table.slots[page] >= 0:
            assert readers.mass(page).sum() <= 2 * PREFILL_QUERIES, "one prompt's queries, not two prompts'"
    held = np.flatnonzero(readers.table.slots >= 0)
    assert not np.intersect1d(held, readers.server.allocator.free_page_numbers).size


def test_decode_steps_are_sampled_at_fixed_forwards():
    readers = Readers()
    readers.read(tokens_of([1, 2, 3, 4], tail=7), look_at=40, answer=0)
    pages = readers.read(tokens_of([1, 2, 3, 4], tail=7), look_at=50, answer=DECODE_INTERVAL)
    sampled = sum(now % DECODE_INTERVAL == 0 for now in range(3, 3 + DECODE_INTERVAL))
    assert sampled == 1
    own = 7  # the second request computed its tail alone
    assert readers.mass(pages[1])[50 % PAGE_TOKENS] == pytest.approx(2 * (own + sampled), rel=1e-2)


def test_the_nearest_tokens_get_nothing():
    readers = Readers()
    prompt = tokens_of([1, 2, 3], tail=7)
    pages = readers.read(prompt, look_at=None)
    last = len(prompt) - NEAREST
    visits = readers.table.visits[readers.table.slots[pages]].flatten()
    assert not visits[last:].any()
    assert visits[: last - PREFILL_QUERIES + 1].eq(PREFILL_QUERIES).all()


@pytest.mark.parametrize(
    ("new_tokens", "most", "queries"),
    [(500, 64, 32), (500, 32, 32), (500, 31, 4), (12, 64, 32), (12, 8, 4), (3, 64, 4), (1, 64, 1), (500, 0, 1)],
)
def test_few_numbers_of_queries(new_tokens, most, queries):
    """Each number is a kernel of its own on a GPU; a prompt shorter than its number has missing queries."""
    assert _queries(new_tokens, most) == queries


def test_a_store_without_a_mass_table_is_refused():
    with pytest.raises(ValueError, match="policy window does not go by attention mass; there is no table to fill"):
        MassSampling(Batch(group=2, head_dim=64, count=1).store)
