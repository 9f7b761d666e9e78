"""Token-exact conversations and the shape of the workload."""

import pytest
from transformers import AutoTokenizer

from benchmarks.demo import prompts
from benchmarks.demo.workload import Conversation, Replay, Turn, replay
from oscar_radix.model import prepare


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(prepare(progress=lambda line: None))


class FakeServer:
    """Answers a fixed text; every prompt token that an earlier prompt or answer had at the same place counts as cached."""

    name = "fake"

    def __init__(self, answer: list[int]) -> None:
        self.answer = answer
        self.seen: list[list[int]] = []

    def generate(self, ids, max_new_tokens, temperature):
        cached = max((_common(ids, other) for other in self.seen), default=0)
        self.seen.append(ids + self.answer)
        meta = {"prompt_tokens": len(ids), "cached_tokens": cached, "completion_tokens": len(self.answer)}
        return {"output_ids": self.answer, "meta_info": meta}


def _common(left, right):
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def test_the_workload_is_the_one_that_was_promised(tokenizer):
    assert prompts.AGENTS >= 6
    assert prompts.TURNS >= 5
    systems = [prompts.system_prompt(agent) for agent in range(prompts.AGENTS)]
    assert len(set(systems)) == 2
    for system in set(systems):
        assert 1000 <= len(tokenizer(system).input_ids) <= 1500
    assert len({tuple(prompts.user_turns(agent)) for agent in range(prompts.AGENTS)}) == prompts.AGENTS
    assert not any("{" in text for agent in range(prompts.AGENTS) for text in prompts.user_turns(agent))


@pytest.mark.parametrize("ended", [True, False])
def test_prompts_extend_each_other_and_read_as_the_template_does(tokenizer, ended):
    conversation = Conversation(tokenizer, "Be brief.", ["First?", "Second?"])
    first = conversation.next_prompt()
    answer = tokenizer("An answer.").input_ids + [tokenizer.eos_token_id] * ended
    conversation.add_answer(answer)
    second = conversation.next_prompt()
    assert second[: len(first) + len(answer)] == first + answer
    messages = [("system", "Be brief."), ("user", "First?"), ("assistant", "An answer."), ("user", "Second?")]
    whole = [{"role": role, "content": content} for role, content in messages]
    assert second == tokenizer(tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)).input_ids
    assert conversation.prompt_lengths == [len(first), len(second)]


def test_replay_feeds_answers_back_and_counts(tokenizer):
    answer = tokenizer("All right.").input_ids
    server = FakeServer(answer)
    lines = []
    result = replay(server, tokenizer, answer_tokens=8, temperature=0.0, concurrency=1, progress=lines.append, watch=lambda: len(lines))
    assert [(turn.turn, turn.agent) for turn in result.turns] == [(t, a) for t in range(1, 6) for a in range(6)]
    assert result.rounds == [0, 1, 2, 3, 4]
    # From the second turn on everything but the new message was seen before: the earlier prompt, and the answer.
    before = {turn.agent: turn for turn in result.turns if turn.turn == 1}
    for turn in (turn for turn in result.turns if turn.turn == 2):
        assert turn.cached_tokens == before[turn.agent].prompt_tokens + len(answer)


def test_by_turn_sums_over_agents():
    result = Replay(turns=[Turn(0, 1, 10, 1, 5), Turn(1, 1, 20, 2, 5), Turn(0, 2, 30, 20, 5)])
    assert result.by_turn() == [
        {"turn": 1, "prompt_tokens": 30, "cached_tokens": 3},
        {"turn": 2, "prompt_tokens": 30, "cached_tokens": 20},
    ]
    assert (result.prompt_tokens, result.cached_tokens) == (60, 23)
