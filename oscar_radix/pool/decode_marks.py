"""Window marks of decode steps, brought up to date by what one more token changes."""

from dataclasses import dataclass

import numpy as np

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.pages import PageTable
from oscar_radix.pool.request_pages import DecodeStep
from oscar_radix.sequence import SINK_PAGES


@dataclass(frozen=True)
class _Last:
    rows: np.ndarray
    lengths: np.ndarray
    version: int


class DecodeMarks:
    """Marks what `Residency.prepare` would mark for the same sequences.

    A step of the same requests as the last one, each one token longer, moves a window by a page at most, and no request's pages need
    to be looked at but those. Any other step marks every page of its requests. Whoever changes marks between two steps calls `forget`.
    """

    def __init__(self, table: PageTable, recent_tokens: int):
        self._table = table
        self._recent = recent_tokens
        self._last: _Last | None = None
        self._columns = np.arange(-(-recent_tokens // PAGE_TOKENS) + 1)
        self._sinks = np.arange(SINK_PAGES)

    def forget(self) -> None:
        """The next step marks everything."""
        self._last = None

    def mark(self, step: DecodeStep, now: int) -> np.ndarray | None:
        """Mark the windows of a step.

        Returns:
            Pages that may have left a window, int64; None when they can be any.
        """
        counts = -(-step.lengths // PAGE_TOKENS)
        first = np.maximum(step.lengths - self._recent, 0) // PAGE_TOKENS
        left = self._move(step, counts, first) if self._continues(step) else self._unmark(step, counts)
        columns = np.concatenate([np.broadcast_to(self._sinks, (len(first), SINK_PAGES)), first[:, None] + self._columns], axis=1)
        window = step.requests.pages[step.rows[:, None], np.minimum(columns, counts[:, None] - 1)]
        self._table.window[window] = True
        self._table.last_use[window] = now
        self._last = _Last(step.rows.copy(), step.lengths.copy(), step.requests.version)
        return left

    def _continues(self, step: DecodeStep) -> bool:
        last = self._last
        return (
            last is not None
            and last.version == step.requests.version
            and np.array_equal(last.rows, step.rows)
            and np.array_equal(last.lengths + 1, step.lengths)
        )

    def _move(self, step: DecodeStep, counts: np.ndarray, first: np.ndarray) -> np.ndarray:
        pages, table = step.requests.pages, self._table
        begun = step.lengths % PAGE_TOKENS == 1
        if begun.any():
            table.position[pages[step.rows[begun], counts[begun] - 1]] = counts[begun] - 1
        moved = (first > np.maximum(step.lengths - 1 - self._recent, 0) // PAGE_TOKENS) & (first > SINK_PAGES)
        left = pages[step.rows[moved], first[moved] - 1]
        table.window[left] = False
        return left

    def _unmark(self, step: DecodeStep, counts: np.ndarray) -> None:
        table, order = self._table, np.arange(counts.max(initial=0))
        for row, count in zip(step.rows.tolist(), counts.tolist(), strict=True):
            pages = step.requests.pages[row, :count]
            table.position[pages] = order[:count]
            table.window[pages] = False
            table.prefilling[pages] = False
