"""A page's record depends on its tokens alone: not on chunks, batches, paths, the hot pool, the policy or page numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.attention.backend import TorchAttention
from oscar_radix.attention.plan import plan_forward
from oscar_radix.codec import RECIPES
from oscar_radix.codec.int8_rows import quantise_rows
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.policy import POLICIES
from oscar_radix.sequence import Sequence
from tests.helpers import GEOMETRY, make_store, page_count, random_qkv, record_of

TOKENS = 200
SCALE = 0.125


class Conversation:
    """q, k, v of one sequence in every layer, and how far it has been computed."""

    def __init__(self, seed: int, pages: np.ndarray):
        generator = torch.Generator().manual_seed(seed)
        self.layers = [random_qkv(GEOMETRY, TOKENS, generator) for _ in range(GEOMETRY.layers)]
        self.pages = pages
        self.done = 0

    def grow(self, tokens: int, decode: bool) -> Sequence:
        self.done += tokens
        return Sequence(self.pages[: page_count(self.done)], self.done - tokens, self.done, decode)


def forward(store, conversations: list[Conversation], tokens: list[int], decode: bool) -> list[torch.Tensor]:
    """One forward over several conversations; outputs [T, Hq, D] by layer."""
    sequences = [conversation.grow(count, decode) for conversation, count in zip(conversations, tokens, strict=True)]
    plan = plan_forward(store, sequences)
    attention = TorchAttention(store)
    outputs = []
    for layer in range(GEOMETRY.layers):
        parts = [
            [tensor[sequence.prefix_len : sequence.seq_len] for tensor in conversation.layers[layer]]
            for conversation, sequence in zip(conversations, sequences, strict=True)
        ]
        q, k, v = (torch.cat(column) for column in zip(*parts, strict=True))
        outputs.append(attention.run(layer, q, k, v, plan, SCALE))
    return outputs


def expected_record(store, conversation: Conversation, index: int) -> list[torch.Tensor]:
    """The record of page `index`, sealed by itself without any plan, by layer: [Hkv, 32, ...]."""
    span = slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
    found = []
    for layer, (_, k, v) in enumerate(conversation.layers):
        k8, k_scale, _ = quantise_rows(store.codec.keys_to_basis(layer, k[span]))
        v8, v_scale, _ = quantise_rows(store.codec.values_to_basis(layer, v[span]))
        rows = [tensor.transpose(0, 1)[None] for tensor in (k8, k_scale, v8, v_scale)]
        found.append([part[0] for part in store.codec.seal(layer, *rows)])
    return found


def check_records(store, conversations: list[Conversation]) -> int:
    """Every sealed page of every conversation, bit for bit; returns how many there are."""
    checked = 0
    for conversation in conversations:
        for index in range(conversation.done // PAGE_TOKENS):
            page = int(conversation.pages[index])
            assert store.table.sealed[page]
            for layer, expected in enumerate(expected_record(store, conversation, index)):
                for part, (ours, theirs) in enumerate(zip(record_of(store, layer, page), expected, strict=True)):
                    assert torch.equal(ours, theirs), f"page {index} of the sequence, layer {layer}, part {part}"
            checked += 1
    return checked


def check_int8_rows(store, conversations: list[Conversation]) -> None:
    """Every page at level 32 holds exactly the rows of its tokens."""
    for conversation in conversations:
        for index in range(conversation.done // PAGE_TOKENS):
            page = conversation.pages[index : index + 1]
            if not store.is_whole(page)[0]:
                continue
            span = slice(index * PAGE_TOKENS, (index + 1) * PAGE_TOKENS)
            for layer, (_, k, _) in enumerate(conversation.layers):
                rows = store.hot.read(layer, store.hot.blocks_of(page, PAGE_TOKENS))
                k8, k_scale, _ = quantise_rows(store.codec.keys_to_basis(layer, k[span]))
                assert torch.equal(rows.k[0], k8.transpose(0, 1))
                assert torch.equal(rows.k_scale[0], k_scale.transpose(0, 1))


@settings(max_examples=100, deadline=None)
@given(data=st.data(), recipe=st.sampled_from(list(RECIPES)), policy=st.sampled_from(list(POLICIES)))
def test_any_schedule_writes_the_same_records(data, recipe, policy):
    """1 to 3 conversations, prefilled in random chunks and batches, then decoded in random batches, on any hot pool."""
    count = data.draw(st.integers(1, 3), label="conversations")
    # The smallest pool: each conversation's partial page, and the one that follows it when a chunk crosses its end.
    hot_pages = data.draw(st.integers(2 * count, 24), label="hot pages")
    recent = data.draw(st.sampled_from([32, 64, 128]), label="recent tokens")
    store = make_store(pages=24, hot_pages=hot_pages, policy=policy, recent_tokens=recent, recipe=recipe)
    numbers = np.array(data.draw(st.permutations(range(1, 25)), label="page numbers"))
    conversations = [Conversation(seed, numbers[seed * 7 : seed * 7 + 7]) for seed in range(count)]
    for conversation in conversations:
        store.allocate(conversation.pages)
    prompts = [data.draw(st.integers(1, TOKENS - 10), label="prompt tokens") for _ in conversations]
    while True:
        waiting = [c for c, prompt in zip(conversations, prompts, strict=True) if c.done < prompt]
        if not waiting:
            break
        batch = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique_by=id), label="batch")
        chunk = data.draw(st.sampled_from([7, 32, 33, 64, 100, 200]), label="chunk")
        forward(store, batch, [min(chunk, prompts[conversations.index(c)] - c.done) for c in batch], decode=False)
        store.hot.check_integrity()
    for _ in range(data.draw(st.integers(0, 10), label="decode steps")):
        batch = data.draw(st.lists(st.sampled_from(conversations), min_size=1, unique_by=id), label="decode batch")
        forward(store, batch, [1] * len(batch), decode=True)
    check_records(store, conversations)
    check_int8_rows(store, conversations)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_decode_seals_what_prefill_seals(recipe):
    store = make_store(pages=24, hot_pages=24, recipe=recipe)
    prefilled, decoded = Conversation(0, np.arange(1, 8)), Conversation(0, np.arange(8, 15))
    for conversation in (prefilled, decoded):
        store.allocate(conversation.pages)
    forward(store, [prefilled], [70], decode=False)
    forward(store, [decoded], [1], decode=False)
    for _ in range(69):
        forward(store, [decoded], [1], decode=True)
    assert check_records(store, [prefilled, decoded]) == 4


def test_a_prompt_larger_than_the_hot_pool_is_sealed_without_hot_rows():
    store = make_store(pages=24, hot_pages=1)
    conversation = Conversation(0, np.arange(1, 8))
    store.allocate(conversation.pages)
    forward(store, [conversation], [TOKENS], decode=False)
    assert store.residency.sealed_without_hot_rows == 6, "6 full pages, and the partial one has the only blocks"
    assert check_records(store, [conversation]) == 6


def test_a_chunk_that_begins_and_ends_within_pages_is_sealed_from_both_sides():
    store = make_store(pages=24, hot_pages=2)
    conversation = Conversation(0, np.arange(1, 8))
    store.allocate(conversation.pages)
    for chunk in (20, 1, 11, 50, 100, 18):
        forward(store, [conversation], [chunk], decode=False)
    assert conversation.done == TOKENS
    assert check_records(store, [conversation]) == 6
