"""The cells that are measured, and the scores that choose rows."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from benchmarks.quality.reading import NEAREST, Mass, Prefix
from benchmarks.quality.selection import GRANULARITIES
from oscar_radix.calibration.evaluate import SINK_TOKENS
from oscar_radix.codec import RECIPES, Recipe
from oscar_radix.codec.tck import TckRecipe

EVEN = "tck-even"
MEASURED: dict[str, Recipe] = {**RECIPES, EVEN: TckRecipe(refined_share=0.0)}
"""`tck-even`: tck with all layers at 2 bits, which the controls of uniform bits add to."""
UNIFORM_BITS = (2.0, 2.5, 2.75, 3.0, 3.25)
ROW_BITS = {"int8": 8, "int4": 4, "plain4": 4}
HOT_ROWS = (2, 4, 8)
SERVER_ROWS = (0.5, 1, 2, 4)
"""Values of `--oscar-hot-rows`."""
POLICIES = ("attention", "window", "random")
WINDOWS = (64, 256)
DEFAULT_SCORE = "mass"


@dataclass(frozen=True)
class Cell:
    """One way to keep a prefix. rows: hot rows of 32 tokens between sinks and recent window, on average; window: recent tokens at int8;
    score: of SCORES; granularity: of `selection.GRANULARITIES`; key_bits: K's average bits in every record, with the row scale searched;
    None: records as the recipe makes them; path: `hit`, or `miss`: the reader's request computed the prefix, so that its prompt read it
    at int8, and only what it decodes reads what is kept (recall tasks, whose readers are a question and an answer)."""

    recipe: str = "tck"
    policy: str = "none"
    rows: float = 0
    row_format: str = "int8"
    window: int = 256
    score: str = DEFAULT_SCORE
    granularity: str = "page"
    key_bits: float | None = None
    path: str = "hit"

    @property
    def line(self) -> str:
        """Name of the line of the plot that this cell is a point of."""
        return "uniform K" if self.key_bits and self.policy == "none" else self.policy

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
    return [Cell()] + [Cell(policy=policy, rows=2) for policy in POLICIES]


def recipe_cells(
    recipe: str, windows: tuple[int, ...], formats: tuple[str, ...], hot_rows: tuple[int, ...] = HOT_ROWS
) -> list[Cell]:
    """No hot rows, and every policy at each of `hot_rows`."""
    cells = [Cell(recipe, window=window) for window in windows]
    for window in windows:
        for row_format in formats:
            for policy in POLICIES:
                cells += [Cell(recipe, policy, rows, row_format, window) for rows in hot_rows]
    return cells


def uniform_cells(windows: tuple[int, ...]) -> list[Cell]:
    return [Cell(EVEN, window=window, key_bits=bits) for window in windows for bits in UNIFORM_BITS]


def search_cells(rows: int = 2) -> list[Cell]:
    """Every score at page granularity, every granularity by mass, budgets by an error-weighted score, plain int4 rows, one row a page on
    average where mass says; window 256."""
    default = Cell(policy="attention", rows=rows)
    cells = [default] + [replace(default, score=score) for score in SCORES if score != default.score]
    cells += [replace(default, granularity=granularity) for granularity in GRANULARITIES if granularity != default.granularity]
    cells += [replace(default, granularity=granularity, score="mass x error^2") for granularity in ("layer-budget", "head-budget")]
    return [*cells, replace(default, row_format="plain4"), replace(default, rows=1, granularity="page-budget")]


def breadth_cells() -> list[Cell]:
    """Each recipe and the short window with 0 and 2 int8 rows."""
    wanted = (("tck", 256), ("tck", 64), ("mulm", 256), ("oscar", 256))
    return [cell for recipe, window in wanted for cell in recipe_cells(recipe, (window,), ("int8",), (2,))]


def default_cells() -> list[Cell]:
    """tck at a window of 256: int8 rows by every policy, int4 rows by attention, uniform bits, int8 rows over records with searched scales.
    """
    cells = [Cell(), *uniform_cells((256,)), *server_cells()]
    cells += [Cell(policy=policy, rows=rows) for rows in HOT_ROWS for policy in POLICIES if rows < 8 or policy == "attention"]
    cells += [Cell(policy="attention", rows=rows, row_format="int4") for rows in (2, 4)]
    return cells + [Cell(EVEN, policy, rows=2, key_bits=2.0) for policy in POLICIES]


def server_cells() -> list[Cell]:
    """Levels of pages as the server's policy decides them, the same without refined layers, and the controls of its lowest bytes."""
    cells = [Cell(policy="attention", rows=rows, granularity="server") for rows in SERVER_ROWS]
    cells += [Cell(EVEN), *(replace(cell, recipe=EVEN) for cell in cells if cell.rows in (1, 2))]
    return cells + [Cell(policy=policy, rows=1) for policy in ("window", "random")]


def full_cells() -> list[Cell]:
    """Every recipe x policy x number of rows x format x window, and the server's rule."""
    cells = server_cells()
    cells += [cell for recipe in ("tck", "mulm", "oscar") for cell in recipe_cells(recipe, WINDOWS, ("int8", "int4"))]
    return cells + uniform_cells(WINDOWS)


def recall_cells() -> list[Cell]:
    chosen = [Cell()] + [Cell(policy=policy, rows=2) for policy in POLICIES]
    chosen += [Cell(recipe, "attention", rows, granularity="server") for recipe in ("tck", EVEN) for rows in (1, 2)]
    chosen += [replace(cell, path="miss") for cell in chosen if cell.policy in ("none", "attention")]
    return [*chosen, *uniform_cells((256,)), Cell(EVEN, "attention", 2, key_bits=2.0), Cell("oscar")]
