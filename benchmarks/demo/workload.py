"""Replays the conversations against one server, turn by turn, and records what the server says about its cache."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from benchmarks.demo import prompts
from benchmarks.servers import SglangServer


@dataclass(frozen=True)
class Turn:
    """One request: `agent` and `turn` count from 0 and 1; token counts as the server reports them."""

    agent: int
    turn: int
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int


class Conversation:
    """The exact token ids of one agent's conversation.

    The prompt of turn n+1 is the prompt of turn n, the ids that the server answered, and the ids of the next user message. Nothing is
    decoded and encoded again, so prefixes match token by token. New text starts at a special token, which byte-level BPE never merges
    across: encoding it alone gives the ids that encoding the whole conversation would.
    """

    def __init__(self, tokenizer, system: str, user_turns: list[str]) -> None:
        self._tokenizer = tokenizer
        self._system = {"role": "system", "content": system}
        self._user_turns = user_turns
        self._end_of_message = tokenizer.eos_token_id
        self.ids: list[int] = []
        self.prompt_lengths: list[int] = []

    def next_prompt(self) -> list[int]:
        """Append the next user message and return the ids to send."""
        message = {"role": "user", "content": self._user_turns[len(self.prompt_lengths)]}
        if self.ids:
            text = self._added_by(message)
            # The template ends an answer with <|im_end|>, which is there already when the model said it itself.
            if self.ids[-1] != self._end_of_message:
                text = self._tokenizer.eos_token + text
        else:
            text = self._render([self._system, message], add_generation_prompt=True)
        self.ids += self._tokenizer(text, add_special_tokens=False).input_ids
        self.prompt_lengths.append(len(self.ids))
        return list(self.ids)

    def add_answer(self, ids: list[int]) -> None:
        self.ids += ids

    def _added_by(self, message: dict) -> str:
        """What the template puts after the <|im_end|> of an answer: its line break, `message`, and the start of the next answer."""
        before = self._render([self._system], add_generation_prompt=False)
        after = self._render([self._system, message], add_generation_prompt=True)
        if not after.startswith(before):
            raise ValueError("the chat template rewrites earlier messages, so that prefixes of a conversation would not match")
        return "\n" + after[len(before) :]

    def _render(self, messages: list[dict], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


@dataclass
class Replay:
    """What one server did: requests in order, whole conversations, and `watch()` after every round."""

    turns: list[Turn] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    rounds: list = field(default_factory=list)

    @property
    def prompt_tokens(self) -> int:
        return sum(turn.prompt_tokens for turn in self.turns)

    @property
    def cached_tokens(self) -> int:
        return sum(turn.cached_tokens for turn in self.turns)

    def by_turn(self) -> list[dict]:
        """Sums over the agents: [{turn, prompt_tokens, cached_tokens}], turn from 1."""
        numbers = sorted({turn.turn for turn in self.turns})
        return [
            {
                "turn": number,
                "prompt_tokens": sum(turn.prompt_tokens for turn in self.turns if turn.turn == number),
                "cached_tokens": sum(turn.cached_tokens for turn in self.turns if turn.turn == number),
            }
            for number in numbers
        ]


def replay(
    server: SglangServer,
    tokenizer,
    *,
    answer_tokens: int,
    temperature: float,
    concurrency: int,
    progress: Callable[[str], None],
    watch: Callable[[], object] = lambda: None,
) -> Replay:
    """Run every conversation to its end, round by round, `concurrency` requests at a time.

    In round t every agent sends its turn t, so the turns of all agents interleave and an agent's prefix must survive everybody else's turn.
    """
    result = Replay()
    result.conversations = [
        Conversation(tokenizer, prompts.system_prompt(agent), prompts.user_turns(agent)) for agent in range(prompts.AGENTS)
    ]

    def send(agent: int, turn: int) -> Turn:
        conversation = result.conversations[agent]
        answer = server.generate(conversation.next_prompt(), answer_tokens, temperature=temperature)
        conversation.add_answer(answer["output_ids"])
        meta = answer["meta_info"]
        return Turn(agent, turn, meta["prompt_tokens"], meta["cached_tokens"], meta["completion_tokens"])

    with ThreadPoolExecutor(concurrency) as pool:
        for turn in range(1, prompts.TURNS + 1):
            done = list(pool.map(send, range(prompts.AGENTS), [turn] * prompts.AGENTS))
            result.turns += done
            result.rounds.append(watch())
            prompt, cached = sum(t.prompt_tokens for t in done), sum(t.cached_tokens for t in done)
            progress(f"  {server.name}: round {turn} of {prompts.TURNS}, {cached} of {prompt} prompt tokens from the cache")
    return result
