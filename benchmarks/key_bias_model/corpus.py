"""Training text that every Python installation has: sources and documents of its packages, without what the benchmarks are measured on."""

import random
import site
import sysconfig
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.quality.texts import documents

SUFFIXES = (".py", ".md", ".rst", ".txt")
EVALUATED = ("tarfile", "argparse", "cookiejar", "difflib", "typing", "pickletools", "base_events", "pydoc_data")
"""Modules that `benchmarks.quality.texts.documents` reads. Files and folders of these names are left out wherever they stand, since
packages carry copies of the standard library's modules."""
PROJECT = "oscar_radix"
LONGEST_FILE = 200_000
"""Characters read of a file, so that no generated table is a large part of the text."""
MOST_CHARACTERS = 150_000_000
LONG_LINE = 40
COPIED = 0.05
"""A file with more than this share of long lines in the evaluated documents is a copy under another name (typing_extensions)."""
FILES_AT_ONCE = 512
"""Tokenised together: about two million tokens, some 60 steps, in a few seconds of the fast tokeniser."""


def installed_folders() -> list[Path]:
    """The standard library and the site-packages of this interpreter."""
    return [Path(sysconfig.get_path("stdlib")), *map(Path, site.getsitepackages())]


def training_files(folders: list[Path], seed: int) -> list[Path]:
    """Files of `folders` in an order that depends on `seed` and their paths below their folder only."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*"):
            inner = path.relative_to(folder).parts
            # site-packages may stand below the standard library, and belong to another environment.
            if path.suffix in SUFFIXES and not {"site-packages", "dist-packages"} & set(inner) and _allowed(inner) and path.is_file():
                found["/".join(inner)] = path
    files = [found[name] for name in sorted(found)]
    random.Random(seed).shuffle(files)
    return files


def _allowed(parts: tuple[str, ...]) -> bool:
    names = [part.split(".")[0] for part in parts]
    return not any(name in EVALUATED or name.startswith(PROJECT) for name in names)


def training_texts(files: list[Path]) -> Iterator[str]:
    """Texts of `files`, at most MOST_CHARACTERS in all; each text once, and none that copies an evaluated document."""
    evaluated = set(_long_lines("\n".join(documents())))
    seen, characters = set(), 0
    for path in files:
        try:
            with path.open(encoding="utf-8") as file:
                text = file.read(LONGEST_FILE)
        except (OSError, UnicodeDecodeError):
            continue
        lines = _long_lines(text)
        copied = sum(line in evaluated for line in lines)
        # Licences are there hundreds of times.
        if not text.strip() or hash(text) in seen or copied > COPIED * len(lines):
            continue
        seen.add(hash(text))
        characters += len(text)
        yield text
        if characters >= MOST_CHARACTERS:
            return


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= LONG_LINE]


class Stream:
    """Token ids of texts one after the other, each followed by `end`; over again when they are used up."""

    def __init__(self, texts: Callable[[], Iterator[str]], tokenise: Callable[[list[str]], list[list[int]]], end: int) -> None:
        self._texts, self._tokenise, self._end = texts, tokenise, end
        self._source = texts()
        self._waiting = torch.empty(0, dtype=torch.int32)

    def take(self, count: int) -> Tensor:
        """[count] int64: the next tokens."""
        pieces, have = [self._waiting], len(self._waiting)
        while have < count:
            pieces.append(self._more())
            have += len(pieces[-1])
        joined = torch.cat(pieces)
        self._waiting = joined[count:]
        return joined[:count].long()

    def _more(self) -> Tensor:
        texts = list(islice(self._source, FILES_AT_ONCE))
        if not texts:
            self._source = self._texts()
            texts = [next(self._source)]
        ids = [token for tokens in self._tokenise(texts) for token in (*tokens, self._end)]
        return torch.tensor(ids, dtype=torch.int32)
