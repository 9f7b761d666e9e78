"""KL of decoded next-token distributions to those of the bf16 server, after a prefix was computed and after it was found in the cache."""

from pathlib import Path

import numpy as np

from benchmarks.servers import SglangServer
from tests.serving.client import texts
from tests.serving.forcing import decode_forced

POSITIONS = 48
PREFIX_LENGTHS = (704, 768, 832, 896)
"""Whole pages, so that a hit covers a prefix to its last token."""


def parts() -> list[tuple[list[int], list[int]]]:
    """(prompt, forced tokens) of each text: a prefix of whole pages and the one token that every request must compute itself."""
    result = []
    for text, length in zip(texts()[: len(PREFIX_LENGTHS)], PREFIX_LENGTHS, strict=True):
        ids = list(text[: length + 1 + POSITIONS])
        if len(ids) != length + 1 + POSITIONS:
            raise ValueError(f"a text has {len(text)} tokens, {length + 1 + POSITIONS} are needed")
        result.append((ids[: length + 1], ids[length + 1 :]))
    return result


def predictions(server: SglangServer, part: tuple[list[int], list[int]], scratch: Path) -> tuple[int, np.ndarray]:
    """Cached prompt tokens, and float32 [POSITIONS, vocabulary] log-probabilities of tokens decoded one by one."""
    scratch.mkdir(exist_ok=True)
    meta, log_p = decode_forced(server, *part, scratch / f"{server.name}-quality", whole=True)
    return meta["cached_tokens"], log_p


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """KL(p || q) in nats at each position, [POSITIONS], over the whole vocabulary."""
    log_p, log_q = log_p.astype(np.float64), log_q.astype(np.float64)
    return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
