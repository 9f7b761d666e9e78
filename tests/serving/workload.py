"""Four concurrent conversations at a time, two turns each, with given answers; more of them than the tree holds."""

import dataclasses
from pathlib import Path

import numpy as np

from benchmarks.servers import SglangServer
from tests.serving.client import piece, together
from tests.serving.forcing import decode_forced

CONCURRENT, WAVES = 4, 2
FIRST, ANSWER, SECOND = 640, 32, 61
"""Tokens of the first prompt, of each answer, and of the second turn's question."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """`log_p` float32 [ANSWER]: log-probabilities of the answer's tokens, decoded one by one."""

    prompt_tokens: int
    cached_tokens: int
    log_p: np.ndarray


def converse(server: SglangServer, scratch: Path) -> list[list[Turn]]:
    """Both turns of every conversation: [CONCURRENT * WAVES][2]. Wave by wave, so that a wave's second turn comes after other waves."""
    talks = [piece(FIRST + 2 * ANSWER + SECOND, seed=100 + number) for number in range(CONCURRENT * WAVES)]
    turns: list[list[Turn]] = [[] for _ in talks]
    for end in (FIRST, FIRST + ANSWER + SECOND):
        for wave in range(WAVES):
            members = range(wave * CONCURRENT, (wave + 1) * CONCURRENT)
            calls = [
                lambda number=number, end=end: decode_forced(
                    server, talks[number][:end], talks[number][end : end + ANSWER], scratch / f"{server.name}-{number}-{end}"
                )
                for number in members
            ]
            for number, (meta, log_p) in zip(members, together(calls), strict=True):
                turns[number].append(Turn(meta["prompt_tokens"], meta["cached_tokens"], log_p))
    return turns
