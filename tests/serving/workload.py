"""Four concurrent conversations at a time, two turns each; more of them than the tree holds."""

import dataclasses
from pathlib import Path

import numpy as np

from benchmarks.servers import SglangServer
from tests.serving.client import piece, together
from tests.serving.forcing import decode_forced

CONCURRENT, WAVES = 4, 2
SYSTEM, FIRST, ANSWER, SECOND = 192, 640, 16, 77
"""Tokens of a system prompt, of the first prompt with it, of each answer, and of the second turn's question."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """`answer` [ANSWER] token ids, and `log_p` float32 [ANSWER], their log-probabilities, decoded one by one."""

    prompt: list[int]
    cached_tokens: int
    answer: list[int]
    log_p: np.ndarray


def converse(server: SglangServer, scratch: Path, script: list[list[Turn]] | None = None) -> list[list[Turn]]:
    """Both turns of every conversation, [CONCURRENT * WAVES][2], under two system prompts.

    The waves take their second turns in reverse order: the last one finds what it left, the first one what eviction left.

    Args:
        scratch: folder for scratch files.
        script: an earlier run, whose answers are decoded again; None for the server's own greedy answers.
    """
    turns: list[list[Turn]] = [[] for _ in range(CONCURRENT * WAVES)]

    def take_turn(number: int) -> Turn:
        done = turns[number]
        if done:
            prompt = done[0].prompt + done[0].answer + piece(SECOND, seed=120 + number)
        else:
            prompt = piece(SYSTEM, seed=90 + number % 2) + piece(FIRST - SYSTEM, seed=100 + number)
        if script is None:
            result = server.generate(prompt, ANSWER, ignore_eos=True, return_logprob=True)
            meta, answer = result["meta_info"], result["output_ids"]
            log_p = np.array([value for value, *_ in meta["output_token_logprobs"]], dtype=np.float32)
        else:
            answer = script[number][len(done)].answer
            meta, log_p = decode_forced(server, prompt, answer, scratch / f"{server.name}-{number}")
        return Turn(prompt, meta["cached_tokens"], answer, log_p)

    for wave in [*range(WAVES), *reversed(range(WAVES))]:
        members = range(wave * CONCURRENT, (wave + 1) * CONCURRENT)
        for number, turn in zip(members, together([lambda number=number: take_turn(number) for number in members]), strict=True):
            turns[number].append(turn)
    return turns
