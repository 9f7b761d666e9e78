"""Four concurrent conversations at a time, two turns each, with given answers; more of them than the tree holds."""

import dataclasses
from pathlib import Path

import numpy as np

from benchmarks.servers import SglangServer
from tests.serving.client import piece, together
from tests.serving.forcing import decode_forced

CONCURRENT, WAVES = 4, 2
SYSTEM, FIRST, ANSWER, SECOND = 192, 640, 32, 61
"""Tokens of a system prompt, of the first prompt with it, of each answer, and of the second turn's question."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """`log_p` float32 [ANSWER]: log-probabilities of the answer's tokens, decoded one by one."""

    prompt_tokens: int
    cached_tokens: int
    log_p: np.ndarray


def converse(server: SglangServer, scratch: Path) -> list[list[Turn]]:
    """Both turns of every conversation: [CONCURRENT * WAVES][2], under two system prompts.

    The waves take their second turns in reverse order: the last one finds what it left, the first one what eviction left.
    """
    own = FIRST - SYSTEM + 2 * ANSWER + SECOND
    talks = [piece(SYSTEM, seed=90 + number % 2) + piece(own, seed=100 + number) for number in range(CONCURRENT * WAVES)]
    turns: list[list[Turn]] = [[] for _ in talks]

    def turn(number: int, end: int) -> tuple[dict, np.ndarray]:
        scratch_file = scratch / f"{server.name}-{number}-{end}"
        return decode_forced(server, talks[number][:end], talks[number][end : end + ANSWER], scratch_file)

    second = FIRST + ANSWER + SECOND
    for wave, end in [*((wave, FIRST) for wave in range(WAVES)), *((wave, second) for wave in reversed(range(WAVES)))]:
        members = range(wave * CONCURRENT, (wave + 1) * CONCURRENT)
        answers = together([lambda number=number, end=end: turn(number, end) for number in members])
        for number, (meta, log_p) in zip(members, answers, strict=True):
            turns[number].append(Turn(meta["prompt_tokens"], meta["cached_tokens"], log_p))
    return turns
