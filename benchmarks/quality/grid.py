"""The cells that are measured, and the scores that choose rows."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from benchmarks.quality.reading import NEAREST, Mass, Prefix
from oscar_radix.calibration.evaluate import SINK_TOKENS

ROW_BITS = {"int8": 8, "int4": 4, "wide4": 4}
HOT_ROWS = (2, 4, 8)
WINDOWS = (64, 256)
DEFAULT_SCORE = "mass"


@dataclass(frozen=True)
class Cell:
    """One way to keep a prefix. rows: hot rows of each 32 tokens between sinks and recent window; window: recent tokens at int8;
    score: of SCORES; granularity: of `selection.GRANULARITIES`; key_bits: K's average bits in every record, None as the recipe has it."""

    recipe: str = "tck"
    policy: str = "none"
    rows: int = 0
    row_format: str = "int8"
    window: int = 256
    score: str = DEFAULT_SCORE
    granularity: str = "page"
    key_bits: float | None = None

    @property
    def line(self) -> str:
        """Name of the line of the plot that this cell is a point of."""
        return "uniform K" if self.key_bits else self.policy

    def cold(self, tokens: int) -> slice:
        """The tokens of a prefix that are neither sinks nor in the recent window."""
        return slice(SINK_TOKENS, tokens - self.window)


@dataclass(frozen=True)
class Evidence:
    """What scores are made of: a prefix's own mass and its readers' [L, H, P], and the error of its 2-bit rows.

    error: [L, H, P], (query-weighted error of K)**2 times |v|**2, plus |error of V|**2.
    """

    prefix: Prefix
    readers: Mass
    error: Tensor

    @property
    def both(self) -> Mass:
        """Readers and the prefix's last queries."""
        return self.readers + self.prefix.last


def _by_visibility(evidence: Evidence) -> Tensor:
    """The mass of all the prefix's queries over how many of them could give any."""
    first = evidence.prefix.own.first
    could = (evidence.prefix.tokens - NEAREST - first.new_tensor(range(first.shape[-1]))).clamp(min=1)
    return first / could


SCORES: dict[str, Callable[[Evidence], Tensor]] = {
    "mass": lambda e: e.both.first,
    "readers": lambda e: e.readers.first,
    "last queries": lambda e: e.prefix.last.first,
    "all queries": lambda e: e.prefix.own.first,
    "all queries / visibility": _by_visibility,
    "squared mass": lambda e: e.both.second,
    "mass x error": lambda e: e.both.first * e.error.sqrt(),
    "mass x error^2": lambda e: e.both.first * e.error,
    "squared mass x error^2": lambda e: e.both.second * e.error,
    "error": lambda e: e.error,
    "readers, each logit's error": lambda e: e.readers.need,
}
"""`mass`: probabilities of readers and of the prefix's last queries, summed. error: see `Evidence`."""


def quick_cells() -> list[Cell]:
    return [Cell()] + [Cell(policy=policy, rows=2) for policy in ("attention", "window", "random")]


def recipe_cells(recipe: str, windows: tuple[int, ...], formats: tuple[str, ...]) -> list[Cell]:
    """No hot rows, and every policy at every number of them."""
    cells = [Cell(recipe, window=window) for window in windows]
    for window in windows:
        for row_format in formats:
            for policy in ("attention", "window", "random"):
                cells += [Cell(recipe, policy, rows, row_format, window) for rows in HOT_ROWS]
    return cells


def uniform_cells(windows: tuple[int, ...]) -> list[Cell]:
    return [Cell(window=window, key_bits=bits) for window in windows for bits in (2.5, 3.0)]


def search_cells(rows: int = 2) -> list[Cell]:
    """Every score at page granularity, then every granularity by mass and by the error-weighted score; int8 rows, window 256."""
    cells = [Cell(policy="attention", rows=rows, score=score) for score in SCORES if score != DEFAULT_SCORE]
    for granularity in ("prefix", "global", "layer-rows", "model-rows", "whole-pages", "layer-budget", "head-budget", "page-budget"):
        cells.append(Cell(policy="attention", rows=rows, granularity=granularity))
    for granularity in ("global", "layer-budget", "head-budget", "page-budget"):
        cells.append(Cell(policy="attention", rows=rows, granularity=granularity, score="squared mass x error^2"))
    return cells + [Cell(policy="attention", rows=rows, row_format="wide4")]


def default_cells() -> list[Cell]:
    """tck in full; the other recipes with int8 rows and a window of 256; uniform bits; the search."""
    cells = recipe_cells("tck", WINDOWS, ("int8", "int4")) + uniform_cells(WINDOWS)
    return cells + recipe_cells("mulm", (256,), ("int8",)) + recipe_cells("oscar", (256,), ("int8",)) + search_cells()


def full_cells() -> list[Cell]:
    """Every recipe x policy x number of rows x format x window."""
    cells = [cell for recipe in ("tck", "mulm", "oscar") for cell in recipe_cells(recipe, WINDOWS, ("int8", "int4"))]
    return cells + uniform_cells(WINDOWS) + search_cells()


def recall_cells() -> list[Cell]:
    chosen = [Cell()] + [Cell(policy=policy, rows=rows) for policy in ("attention", "window", "random") for rows in (2, 4)]
    return chosen + uniform_cells((256,)) + [Cell("mulm"), Cell("oscar")]
