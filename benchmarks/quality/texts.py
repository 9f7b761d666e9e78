"""Prefixes and readers made of text that no calibration has seen: Python's documentation and sources, and the demo's prose."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

GIVERS = ("same document", "other document", "quote")
"""Readers whose attention is gathered."""
EVALUATED = ("next", "same document", "same document", "same document", "other document", "other document", "quote")
"""Readers whose distributions are compared. next: what follows the prefix in its document; same document: a passage from further on;
other document: a passage of another kind of text; quote: 'As quoted above:' and a passage of the prefix itself, which nobody read before.
A quote asks for rows that no mass can point at, so it is reported on its own, beside the six continuations."""

DOCUMENT_CHARACTERS = 86_016
"""Read of each document: about 20,000 tokens. The same for every length, so that the same number is the same text."""


@dataclass(frozen=True)
class Shared:
    """Token ids of a prefix, of the readers that give mass and of those that are evaluated, with the evaluated ones' kinds.

    scored: per evaluated reader, which of its positions predict an answer (recall tasks); None: all count.
    """

    name: str
    prefix: list[int]
    givers: list[list[int]]
    evaluated: list[list[int]]
    kinds: tuple[str, ...]
    scored: list[list[bool]] | None = None


def documents() -> list[str]:
    """Documentation and source text in turn, each long enough for a prefix and its readers."""
    import argparse
    import asyncio.base_events
    import difflib
    import http.cookiejar
    import pickletools
    import pydoc_data.topics
    import tarfile
    import typing

    topics = pydoc_data.topics.topics
    names = sorted(topics)
    halves = ["\n\n".join(topics[name] for name in names[i::2]) for i in (0, 1)]
    sources = [(tarfile, argparse), (http.cookiejar, difflib), (typing, pickletools), (asyncio.base_events,)]
    texts = ["\n\n".join(inspect.getsource(module) for module in modules) for modules in sources]
    return [halves[0], texts[0], halves[1], texts[1], halves[0][150000:], texts[2], halves[1][150000:], texts[3]]


def prose() -> str:
    """The demo's system prompts, written for this project."""
    folder = Path(__file__).resolve().parents[1] / "demo" / "texts"
    return "\n\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt")))


def shared_texts(tokenise: Callable[[str], list[int]], lengths: list[int], tail: int, first: list[int]) -> list[Shared]:
    """One shared prefix of each of `lengths` tokens with its readers of `tail` tokens; documents are taken in turn.

    first: tokens that a prefix begins with, if the tokeniser puts any.
    """
    made, every = [], documents()
    tokens = [first + tokenise(text[:DOCUMENT_CHARACTERS]) for text in every]
    essay = tokenise(prose())
    for number, length in enumerate(lengths):
        ids, others = tokens[number % len(tokens)], (essay, tokens[(number + 1) % len(tokens)])
        if len(ids) < length + 12 * tail:
            raise ValueError(f"document {number} has {len(ids)} tokens; a prefix of {length} and its readers take {length + 12 * tail}")
        made.append(_shared(f"text-{number}-{length}", ids, others, tokenise("\n\nAs quoted above:\n"), length, tail))
    return made


def _shared(name: str, ids: list[int], others: tuple[list[int], list[int]], quote: list[int], length: int, tail: int) -> Shared:
    prefix, rest = ids[:length], ids[length:]
    gap = max((len(rest) - tail) // 8, tail)

    def reader(kind: str, number: int) -> list[int]:
        if kind == "next":
            return rest[:tail]
        if kind == "same document":
            return rest[number * gap :][:tail]
        if kind == "other document":
            text = others[number % 2]
            return text[len(text) // 3 * (number % 3) :][:tail]
        return (quote + prefix[(number * 5 + 3) * length // 16 :])[:tail]

    # Numbers are places: no evaluated reader reads what a giver has read.
    givers = [reader(kind, place) for kind, place in zip(GIVERS, (5, 1, 0), strict=True)]
    evaluated = [reader(kind, place) for kind, place in zip(EVALUATED, (0, 1, 3, 6, 0, 3, 1), strict=True)]
    return Shared(name, prefix, givers, evaluated, EVALUATED)
