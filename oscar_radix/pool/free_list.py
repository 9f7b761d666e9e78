"""Free pages, blocks or slots, on the host: a stack that hands out those that came back last."""

import numpy as np


class FreeList:
    """Numbers of pages, blocks or slots in the order in which they are handed out; those that come back go to the front.

    Args:
        numbers: int64 [N], the first to go first.
    """

    def __init__(self, numbers: np.ndarray):
        self._stack = np.array(numbers[::-1], dtype=np.int64)
        self._count = len(numbers)

    def __len__(self) -> int:
        return self._count

    @property
    def numbers(self) -> np.ndarray:
        """A copy of all of them in order: int64 [len]."""
        return self._stack[: self._count][::-1].copy()

    def take(self, count: int) -> np.ndarray:
        """The first `count`, int64 [count].

        Raises:
            ValueError: when fewer are free.
        """
        if count > self._count:
            raise ValueError(f"{count} wanted, {self._count} are free")
        taken = self._stack[self._count - count : self._count][::-1].copy()
        self._count -= count
        return taken

    def give_back(self, numbers: np.ndarray) -> None:
        """Put `numbers` (int64 [N]) before all others, in their order."""
        end = self._count + len(numbers)
        if end > len(self._stack):
            self._stack = np.concatenate([self._stack[: self._count], np.zeros(len(numbers), dtype=np.int64)])
        self._stack[self._count : end] = numbers[::-1]
        self._count = end
