"""Page lists of running requests, on the host, so that a decode step asks the device for nothing."""

from dataclasses import dataclass

import numpy as np

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.sequence import Sequence


class RequestPages:
    """The pages of each running request in order, by the request's row in the scheduler's table.

    A stamp tells the requests apart that use a row one after another. A list counts as known only while stamp and length are
    what the caller expects; whoever finds it unknown reads the row from the device and puts it here.
    """

    def __init__(self) -> None:
        self.pages = np.zeros((0, 0), dtype=np.int64)
        """int64 [rows, columns]; row r holds counts[r] valid pages."""
        self.counts = np.zeros(0, dtype=np.int64)
        self.stamps = np.zeros(0, dtype=np.int64)
        self.version = 0
        """Changes whenever a list does other than grow at its end."""
        self.decode_rows_read_back = 0
        """Rows of decode steps that had to be read from the device; 0 unless something unforeseen happens."""
        self.prefill_rows_read_back = 0
        """Rows of prefills that had to be read from the device."""

    def known(self, rows: np.ndarray, stamps: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """bool [B]: the list of a row (int64 [B] each) is that of request `stamps` and covers exactly `tokens` tokens."""
        if len(rows) and rows.max() >= len(self.counts):
            self._grow(int(rows.max()) + 1, 0)
        return (self.stamps[rows] == stamps) & (self.counts[rows] == -(-tokens // PAGE_TOKENS))

    def covers(self, row: int, stamp: int, tokens: int) -> bool:
        """Whether the list of `row` is that of request `stamp` and covers at least `tokens` tokens."""
        return row < len(self.counts) and self.stamps[row] == stamp and self.counts[row] * PAGE_TOKENS >= tokens

    def put(self, row: int, stamp: int, pages: np.ndarray) -> None:
        """Set the list of a row to `pages` (int64 [N])."""
        self._grow(row + 1, len(pages))
        same = self.stamps[row] == stamp and self.counts[row] <= len(pages) and np.array_equal(self.of(row), pages[: self.counts[row]])
        self.version += not same
        self.pages[row, : len(pages)] = pages
        self.counts[row], self.stamps[row] = len(pages), stamp

    def append(self, rows: np.ndarray, pages: np.ndarray) -> None:
        """Add one page (int64 [N]) to the list of each of these distinct rows (int64 [N])."""
        if len(rows):
            self._grow(int(rows.max()) + 1, int(self.counts[rows].max()) + 1)
            self.pages[rows, self.counts[rows]] = pages
            self.counts[rows] += 1

    def replace_start(self, row: int, stamp: int, pages: np.ndarray) -> None:
        """The first pages of a known list are these (int64 [N]) from now on: the tree had the same tokens already."""
        if self.covers(row, stamp, len(pages) * PAGE_TOKENS) and not np.array_equal(self.pages[row, : len(pages)], pages):
            self.pages[row, : len(pages)] = pages
            self.version += 1

    def of(self, row: int) -> np.ndarray:
        """The list of a row: int64 [counts[row]], a view."""
        return self.pages[row, : self.counts[row]]

    def drop(self, row: int) -> None:
        """The request of this row has ended."""
        if row < len(self.counts):
            self.stamps[row], self.counts[row] = 0, 0
        self.version += 1

    def clear(self) -> None:
        """No request is running."""
        self.stamps.fill(0)
        self.counts.fill(0)
        self.version += 1

    def _grow(self, rows: int, columns: int) -> None:
        have_rows, have_columns = self.pages.shape
        if rows <= have_rows and columns <= have_columns:
            return
        rows = have_rows if rows <= have_rows else max(rows, 2 * have_rows)
        columns = have_columns if columns <= have_columns else max(columns, 2 * have_columns)
        grown = np.zeros((rows, columns), dtype=np.int64)
        grown[:have_rows, :have_columns] = self.pages
        self.pages = grown
        missing = rows - have_rows
        self.counts = np.pad(self.counts, (0, missing))
        self.stamps = np.pad(self.stamps, (0, missing))


@dataclass(frozen=True)
class DecodeStep:
    """A decode forward: one new token for each of B requests whose page lists are known.

    rows, lengths int64 [B]: distinct rows of `requests`, and tokens with the new one. Lists cover the new token.
    """

    requests: RequestPages
    rows: np.ndarray
    lengths: np.ndarray

    def pages(self) -> np.ndarray:
        """Pages of all requests, one after another: int64."""
        counts = -(-self.lengths // PAGE_TOKENS)
        columns = np.arange(counts.max(initial=0))
        return self.requests.pages[self.rows, : len(columns)][columns < counts[:, None]]

    def sequences(self) -> list[Sequence]:
        """The same as sequences, in batch order."""
        return [
            Sequence(self.requests.of(row), length - 1, length, decode=True)
            for row, length in zip(self.rows.tolist(), self.lengths.tolist(), strict=True)
        ]
