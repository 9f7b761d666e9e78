"""How far the next-token distributions of the 2-bit cache are from those of the bf16 cache, teacher-forced on the workload's own text.

A segment is a recorded conversation up to a turn's prompt, cut down to whole pages (the prefix), and the tokens that followed (the
continuation). Both servers get prefix + continuation with log-probabilities from the end of the prefix on. SGLang limits a hit to
`logprob_start_len` tokens (`Req._compute_max_prefix_len`), so with a prefix of whole pages, requested once before, the prefix is read
through the cache and the continuation is computed on top of it.

The distributions are compared on the K most likely tokens of the bf16 server and one bucket for the rest. Merging outcomes can only lower a
KL divergence (data-processing inequality), so the figure is a lower bound; the covered mass, which is printed, says how close it is.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.demo.workload import Conversation
from benchmarks.servers import SglangServer

PAGE = 32
TOP_K = 256


@dataclass(frozen=True)
class Segment:
    """`ids[:prefix]` comes out of the cache, `ids[prefix:]` is predicted token by token."""

    ids: list[int]
    prefix: int

    @property
    def positions(self) -> int:
        """Predictions made after the hit: every continuation token but the last is the context of one more prediction."""
        return len(self.ids) - self.prefix - 1


@dataclass(frozen=True)
class Reference:
    """bf16's answer for one segment: per position the K best token ids and their log-probabilities, best first."""

    segment: Segment
    top: list[list[tuple[int, float]]]

    @property
    def ids(self) -> list[int]:
        """Every id of any position, sorted: /generate takes one list for all positions."""
        return sorted({token for position in self.top for token, _ in position})


@dataclass(frozen=True)
class Quality:
    """Means and the median over positions; `cached_share` is the part of all prefix tokens that came out of the second server's cache."""

    mean_kl: float
    median_kl: float
    top1_agreement: float
    positions: int
    covered_mass: float
    cached_share: float


def segments(conversations: Sequence[Conversation], continuation: int) -> list[Segment]:
    """One segment for every turn after the first, `continuation` predictions long where the conversation goes on that far."""
    found = []
    for conversation in conversations:
        for length in conversation.prompt_lengths[1:]:
            prefix = length // PAGE * PAGE
            ids = conversation.ids[: prefix + continuation + 1]
            if len(ids) > prefix + 1:
                found.append(Segment(ids, prefix))
    return found


def reference(server: SglangServer, parts: Sequence[Segment], progress: Callable[[str], None]) -> list[Reference]:
    """The bf16 server's K most likely tokens at every position of every segment."""
    results = []
    for number, segment in enumerate(parts, 1):
        meta = _score(server, segment, top_logprobs_num=TOP_K)
        top = [[(token, value) for value, token, _ in row] for row in meta["input_top_logprobs"][1:]]
        results.append(Reference(segment, top))
        if number % 8 == 0:
            progress(f"  {server.name}: scored {number} of {len(parts)} segments")
    return results


def compare(server: SglangServer, references: Sequence[Reference], progress: Callable[[str], None]) -> Quality:
    """Score the same segments on `server`, after its cache has seen each prefix.

    Raises:
        ValueError: a prefix was not read from the cache at all.
    """
    divergences, agreements, masses, cached, prefixes = [], 0, [], 0, 0
    for number, expected in enumerate(references, 1):
        segment = expected.segment
        server.generate(segment.ids[: segment.prefix], 1)
        meta = _score(server, segment, top_logprobs_num=1, token_ids_logprob=expected.ids)
        if not meta["cached_tokens"]:
            raise ValueError(f"segment {number}: none of its {segment.prefix} prefix tokens came out of the cache, so it measures nothing")
        cached += meta["cached_tokens"]
        prefixes += segment.prefix
        asked = [{token: value for value, token, _ in row} for row in meta["input_token_ids_logprobs"][1:]]
        best = [row[0][1] for row in meta["input_top_logprobs"][1:]]
        for top, ours, our_best in zip(expected.top, asked, best, strict=True):
            divergences.append(coarse_kl([value for _, value in top], [ours[token] for token, _ in top]))
            masses.append(sum(math.exp(value) for _, value in top))
            agreements += our_best == top[0][0]
        if number % 8 == 0:
            progress(f"  {server.name}: scored {number} of {len(references)} segments, KL so far {sum(divergences) / len(divergences):.4f}")
    count = len(divergences)
    return Quality(
        mean_kl=sum(divergences) / count,
        median_kl=statistics.median(divergences),
        top1_agreement=agreements / count,
        positions=count,
        covered_mass=sum(masses) / count,
        cached_share=cached / prefixes,
    )


def coarse_kl(log_p: Sequence[float], log_q: Sequence[float]) -> float:
    """KL(p || q) in nats over the given outcomes and one bucket that holds the rest of either distribution.

    Args:
        log_p, log_q: natural log-probabilities of the same outcomes under p and q.

    A rest below 1e-9 is rounding of the log-probabilities, which are made of bf16 logits, and counts as 1e-9.
    """
    total = sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))
    rest_p = max(1.0 - sum(math.exp(a) for a in log_p), 1e-9)
    rest_q = max(1.0 - sum(math.exp(b) for b in log_q), 1e-9)
    return total + rest_p * math.log(rest_p / rest_q)


def _score(server: SglangServer, segment: Segment, **fields) -> dict:
    answer = server.generate(segment.ids, 1, return_logprob=True, logprob_start_len=segment.prefix, **fields)
    return answer["meta_info"]
