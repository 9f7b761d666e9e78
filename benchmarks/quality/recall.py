"""Recall tasks that the exact cache solves: lines of `word: number`, and sentences to copy among sentences that look alike."""

import random
from collections.abc import Callable

from benchmarks.quality.texts import Shared, prose

_WORDS = """
    apple river stone cloud tiger green music paper window garden silver bridge candle market forest dragon copper winter
    ocean pencil castle rocket violin butter desert anchor button ladder mirror orange planet rabbit saddle temple turtle
    velvet walnut yellow basket camera doctor engine finger guitar hammer island jacket kitten lemon monkey needle onion
    pepper queen ribbon shadow table umbrella valley wagon zebra amber bottle carpet dinner eagle fabric glass honey insect
    jungle kettle letter mountain north office palace quarter road school ticket uncle village water year zone artist border
    coffee detail energy farmer guest history iron judge kingdom lesson member nation opera pocket radio salt teacher
    university vision wheat youth arrow bench chain desk engineer flower gate heart ice
"""
WORDS = _WORDS.split()
GIVERS, READERS = 3, 6
LINES, ASKED = 40, 8
SENTENCES, SENTENCE_WORDS, CUE_WORDS = 12, 6, 2
"""Of seven mixes of words and words given the one that SmolLM2's exact cache copies best."""
SEEDS = {"key-value": 4, "copying": 32}
"""Prefixes of each task; readers of a key-value prefix are asked for more. Over 12 prefixes of copying the standard error is 1.5 points."""
FILLER = 300

Tokenise = Callable[[str], list[int]]
Pieces = list[tuple[str, bool]]
"""Text in pieces; True: an answer."""


def shared_tasks(tokenise: Tokenise, first: list[int], seeds: dict[str, int] = SEEDS) -> list[Shared]:
    """Prefixes of about 1,500 tokens. Evaluated readers ask for other lines and sentences than the givers."""
    makers = {"key-value": _key_value, "copying": _copying}
    return [makers[task](tokenise, first, seed) for task, count in seeds.items() for seed in range(1, count + 1)]


def _key_value(tokenise: Tokenise, first: list[int], seed: int) -> Shared:
    draw = random.Random(seed)
    words = draw.sample(WORDS, LINES)
    lines = [f"{word}: {draw.randint(100, 999)}" for word in words]
    listed = "Remember this list.\n\n" + "\n".join(lines) + "\n\n"
    again = "The same list again.\n\n" + "\n".join(draw.sample(lines, LINES)) + "\n\n"
    half = LINES // 2

    def reader(pool: list[str]) -> Pieces:
        asked: Pieces = [("Some lines of the list, in another order.\n\n", False)]
        for line in draw.sample(pool, ASKED):
            word, number = line.split(" ")
            asked += [(f"{word} ", False), (number, True), ("\n", False)]
        return asked

    return _shared(tokenise, first, "key-value", seed, (listed, again), [reader(lines[:half]) for _ in range(GIVERS)],
                   [reader(lines[half:]) for _ in range(READERS)])


def _copying(tokenise: Tokenise, first: list[int], seed: int) -> Shared:
    draw = random.Random(100 + seed)
    words = draw.sample(WORDS, SENTENCES * SENTENCE_WORDS)
    sentences = [" ".join(words[i * SENTENCE_WORDS :][:SENTENCE_WORDS]) for i in range(SENTENCES)]
    listed = "".join(f"Sentence {number}: {text}.\n" for number, text in enumerate(sentences, 1)) + "\n"
    half = SENTENCES // 2

    def reader(number: int) -> Pieces:
        words = sentences[number - 1].split(" ")
        cue, answer = " ".join(words[:CUE_WORDS]), " ".join(words[CUE_WORDS:])
        return [("Repeat one of the sentences.\n\n", False), (f"Sentence {number}: {cue}", False), (f" {answer}", True), (".\n", False)]

    return _shared(tokenise, first, "copying", seed, (listed, "All of it again.\n\n" + listed * 3), [reader(1 + i) for i in range(GIVERS)],
                   [reader(half + 1 + i) for i in range(READERS)])


def _shared(
    tokenise: Tokenise, first: list[int], task: str, seed: int, lists: tuple[str, str], givers: list[Pieces], evaluated: list[Pieces]
) -> Shared:
    """Filler, list, filler, list again, filler that is longer than the recent window; readers padded to one length."""
    filler = tokenise(prose())
    parts = [filler[i * FILLER :][:FILLER] for i in range(3)]
    prefix = first + parts[0] + tokenise("\n\n" + lists[0]) + parts[1] + tokenise("\n\n" + lists[1]) + parts[2]
    prefix = prefix[: len(prefix) // 32 * 32] + tokenise("\n\n")
    prefix = first + prefix[len(first) + len(prefix) % 32 :]
    made = [[_tokens(tokenise, reader) for reader in readers] for readers in (givers, evaluated)]
    padding = tokenise("\n")[:1]
    longest = [max(len(ids) for ids, _ in readers) for readers in made]
    ids = [[x + padding * (most - len(x)) for x, _ in readers] for readers, most in zip(made, longest, strict=True)]
    scored = [flags + [False] * (longest[1] - len(flags)) for _, flags in made[1]]
    return Shared(f"{task}-{seed}", prefix, ids[0], ids[1], (task,) * len(ids[1]), scored)


def _tokens(tokenise: Tokenise, pieces: Pieces) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether the *next* one belongs to an answer."""
    ids: list[int] = []
    answer: list[bool] = []
    for text, is_answer in pieces:
        added = tokenise(text)
        ids += added
        answer += [is_answer] * len(added)
    return ids, answer[1:] + [False]
