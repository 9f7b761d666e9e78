"""Free pages, on the host: a stack that hands out the pages that came back last."""

import numpy as np


class FreeList:
    """Pages in the order in which they are handed out; those that come back go to the front.

    Args:
        pages: int64 [N], the first to go first.
    """

    def __init__(self, pages: np.ndarray):
        self._stack = np.array(pages[::-1], dtype=np.int64)
        self._count = len(pages)

    def __len__(self) -> int:
        return self._count

    @property
    def pages(self) -> np.ndarray:
        """A copy of all of them in order: int64 [len]."""
        return self._stack[: self._count][::-1].copy()

    def take(self, count: int) -> np.ndarray:
        """The first `count` pages, int64 [count].

        Raises:
            ValueError: when fewer are free.
        """
        if count > self._count:
            raise ValueError(f"{count} pages wanted, {self._count} are free")
        taken = self._stack[self._count - count : self._count][::-1].copy()
        self._count -= count
        return taken

    def give_back(self, pages: np.ndarray) -> None:
        """Put `pages` (int64 [N]) before all others, in their order."""
        end = self._count + len(pages)
        if end > len(self._stack):
            self._stack = np.concatenate([self._stack[: self._count], np.zeros(len(pages), dtype=np.int64)])
        self._stack[self._count : end] = pages[::-1]
        self._count = end
