"""The prefix cache changes what is computed, never what is stored or answered: the same traffic with the tree and without.

The model is a toy: a layer's q, k and v are a deterministic function of the token, its position and the layer. Requests are multi-turn
conversations over two shared system prompts, 4 at a time, prefilled in chunks, in a pool too small for all of them.
"""

import random
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import pytest
import torch

from oscar_radix.attention.backend import TorchAttention
from oscar_radix.attention.plan import ForwardPlan
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from tests.helpers import make_store, random_qkv, record_of
from tests.mini_server import MiniServer, Request

GEOMETRY = Geometry(layers=2, kv_heads=2, query_heads=4, head_dim=64)
SCALE = 0.125
RECENT = 64
CONCURRENT = 4
SAME_PRECISION = 2e-2
"""bf16 outputs of rows that are the same, summed in another order: one bf16 step at the largest output (about 3)."""
INT8_NOISE = 6e-2
"""A prompt's own chunk is read as computed, a cached prefix as int8."""


@lru_cache(maxsize=100_000)
def toy_rows(token: int, position: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k, v of one token by layer."""
    generator = torch.Generator().manual_seed(token * 4096 + position)
    return [random_qkv(GEOMETRY, 1, generator) for _ in range(GEOMETRY.layers)]


@dataclass
class Step:
    """What one request read and got in one forward."""

    turn: tuple[int, int]
    position: int
    decode: bool
    levels: tuple[int, ...]
    output: torch.Tensor


@dataclass
class Traffic:
    """Drives a MiniServer through conversations and keeps what can be compared: outputs, levels, records, hits."""

    server: MiniServer
    keep_continuations: bool = True
    steps: dict[tuple, Step] = field(default_factory=dict)
    records: dict[tuple, list[torch.Tensor]] = field(default_factory=dict)
    cached: int = 0
    prompt_tokens: int = 0

    def run(self, conversations: list[list[tuple[list[int], list[int]]]], chunk: int) -> None:
        """Each conversation is a list of (new user tokens, answer); its turns follow each other, conversations interleave."""
        ready = [(c, 0, []) for c in range(len(conversations))]
        active: list[tuple[Request, int, int, list[int]]] = []
        while ready or active:
            while ready and len(active) < CONCURRENT:
                c, turn, history = ready.pop(0)
                prompt = history + conversations[c][turn][0]
                active.append((self._start(prompt), c, turn, list(conversations[c][turn][1])))
            self._prefill([entry for entry in active if entry[0].prompt_left > 0][:2], chunk)
            generating = [entry for entry in active if entry[0].prompt_left <= 0]
            if generating:
                self._decode(generating)
            for entry in [entry for entry in generating if not entry[3]]:
                request, c, turn, _ = entry
                active.remove(entry)
                self._keep_records(request)
                self.server.finish(request)
                if turn + 1 < len(conversations[c]):
                    ready.append((c, turn + 1, request.tokens.tolist()))
            if not self.server.tree.is_chunk_cache():
                self.server.tree.check_integrity()

    def _start(self, prompt: list[int]) -> Request:
        request = self.server.start(prompt)
        self.cached += request.kv_committed_len
        self.prompt_tokens += len(prompt)
        return request

    def _prefill(self, entries: list, chunk: int) -> None:
        grows = [(request, min(chunk, request.prompt_left)) for request, *_ in entries]
        while grows and not self.server.has_room(grows):
            grows.pop()
        if grows:
            self._forward(entries[: len(grows)], [grow for _, grow in grows], self.server.prefill(grows), decode=False)
            self.server.end_of_prefill([request for request, _ in grows])

    def _decode(self, entries: list) -> None:
        requests = [request for request, *_ in entries]
        assert self.server.has_room([(request, 1) for request in requests])
        if not self.keep_continuations:
            self.server.store.table.continuation.fill(False)
        plan = self.server.decode(requests, [answer.pop(0) for *_, answer in entries])
        self._forward(entries, [1] * len(entries), plan, decode=True)

    def _forward(self, entries: list, grows: list[int], plan: ForwardPlan, decode: bool) -> None:
        store, attention = self.server.store, TorchAttention(self.server.store)
        rows = []
        for (request, *_), grow in zip(entries, grows, strict=True):
            end = request.kv_committed_len
            rows.extend(toy_rows(request.tokens[at], at) for at in range(end - grow, end))
        outputs = []
        for layer in range(GEOMETRY.layers):
            q, k, v = (torch.cat([row[layer][part] for row in rows]) for part in range(3))
            outputs.append(attention.run(layer, q, k, v, plan, SCALE))
        last = torch.tensor(grows).cumsum(0) - 1
        for (request, c, turn, _), index in zip(entries, last.tolist(), strict=True):
            levels = tuple(store.hot.levels[self.server.pages_of(request)].tolist())
            output = torch.stack([layer[index] for layer in outputs])
            step = Step((c, turn), request.kv_committed_len, decode, levels, output)
            self.steps[c, turn, request.kv_committed_len] = step

    def _keep_records(self, request: Request) -> None:
        tokens = request.tokens.tolist()
        for index in range(request.kv_committed_len // PAGE_TOKENS):
            page = int(self.server.pages_of(request)[index])
            record = [part for layer in range(GEOMETRY.layers) for part in record_of(self.server.store, layer, page)]
            prefix = tuple(tokens[: (index + 1) * PAGE_TOKENS])
            for ours, theirs in zip(record, self.records.setdefault(prefix, record), strict=True):
                assert torch.equal(ours, theirs), f"two records of the same {len(prefix)} tokens differ"


def make_conversations(count: int, turns: int, seed: int) -> list[list[tuple[list[int], list[int]]]]:
    """Conversations over 2 shared system prompts of about 4 pages."""
    rng = random.Random(seed)
    systems = [[rng.randrange(50) for _ in range(length)] for length in (130, 117)]
    conversations = []
    for c in range(count):
        parts = []
        for turn in range(turns):
            user = [rng.randrange(50) for _ in range(rng.randrange(70, 110))]
            parts.append(((systems[c % 2] if turn == 0 else []) + user, [rng.randrange(50) for _ in range(rng.randrange(2, 40))]))
        conversations.append(parts)
    return conversations


@lru_cache
def serve(radix: bool, pages: int, hot_pages: int, policy: str, chunk: int, keep_continuations: bool = True) -> Traffic:
    store = make_store(pages, hot_pages, policy, RECENT, geometry=GEOMETRY)
    traffic = Traffic(MiniServer(store, radix=radix), keep_continuations)
    traffic.run(make_conversations(count=6, turns=3, seed=1), chunk)
    return traffic


def compare(on: Traffic, off: Traffic) -> tuple[int, int]:
    """Same records for the same tokens. Same outputs wherever both read the same precision; returns (compared, all) decode steps."""
    compare_records(on, off)
    decodes = [key for key, step in on.steps.items() if step.decode]
    compared = 0
    for key in decodes:
        ours, theirs = on.steps[key], off.steps[key]
        if ours.levels == theirs.levels:
            compared += 1
            assert (ours.output.float() - theirs.output.float()).abs().max() <= SAME_PRECISION, f"decode step {key}"
    return compared, len(decodes)


def compare_records(on: Traffic, off: Traffic) -> None:
    assert on.records.keys() == off.records.keys()
    for prefix, record in on.records.items():
        for ours, theirs in zip(record, off.records[prefix], strict=True):
            assert torch.equal(ours, theirs), f"the record of page {len(prefix) // PAGE_TOKENS - 1} differs with the cache on"


@pytest.mark.parametrize("chunk", [64, 100])
def test_everything_at_int8(chunk):
    """A hot pool large enough that every page is whole: all steps read the same rows, with evictions and multi-turn hits."""
    on = serve(radix=True, pages=60, hot_pages=70, policy="window", chunk=chunk)
    off = serve(radix=False, pages=70, hot_pages=70, policy="window", chunk=chunk)
    assert off.cached == 0
    assert on.cached > 0.4 * on.prompt_tokens
    compared, steps = compare(on, off)
    assert compared == steps
    for key, step in on.steps.items():
        if key in off.steps and not step.decode:
            assert (step.output.float() - off.steps[key].output.float()).abs().max() <= INT8_NOISE, f"prefill step {key}"


def test_pages_are_evicted_on_the_way():
    on = serve(radix=True, pages=60, hot_pages=70, policy="window", chunk=64)
    kept = on.server.tree.total_size() // PAGE_TOKENS
    assert len(on.records) > on.server.store.pages > kept, "more pages were cached than the pool holds"


@pytest.mark.parametrize("chunk", [64, 100])
def test_two_bit_base_under_equal_windows(chunk):
    """Policy `none`: sinks and window at int8, the rest from the base. A reader of the tree has the continuation points of others at
    int8, too; without them both read the same levels in nearly all steps, and those must give equal outputs."""
    on = serve(radix=True, pages=60, hot_pages=40, policy="none", chunk=chunk, keep_continuations=False)
    off = serve(radix=False, pages=70, hot_pages=40, policy="none", chunk=chunk, keep_continuations=False)
    assert on.cached > 0.3 * on.prompt_tokens
    compared, steps = compare(on, off)
    assert compared > 0.8 * steps
    mixed = [step for step in on.steps.values() if step.decode and 0 in step.levels]
    assert len(mixed) > 0.8 * steps, "most steps read base records"


def test_a_reader_of_the_tree_reads_no_less_precision():
    """Whatever a reader finds hot in the tree, it reads at least what it would have had by computing everything itself."""
    on = serve(radix=True, pages=60, hot_pages=60, policy="none", chunk=64)
    off = serve(radix=False, pages=70, hot_pages=60, policy="none", chunk=64)
    for key, step in on.steps.items():
        if step.decode:
            assert (np.array(step.levels) >= np.array(off.steps[key].levels)).all(), f"decode step {key}"


def test_a_small_hot_pool_and_random_rows_keep_the_records():
    on = serve(radix=True, pages=60, hot_pages=14, policy="random", chunk=64)
    off = serve(radix=False, pages=70, hot_pages=60, policy="none", chunk=64)
    compare_records(on, off)
