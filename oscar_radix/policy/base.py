"""Contract of a precision policy: what becomes of hot rows that no recent window needs any more."""

from abc import ABC, abstractmethod

import numpy as np
import torch

LEVELS = (0, 2, 4, 8, 32)
"""Hot int8 rows that each page holds per (layer, KV head). 32 is the whole page, 0 the 2-bit record alone."""

LAG = 4
"""Forwards from the sums of mass that a decision goes by to the decision: long enough for their copy, so that nobody waits."""


class Policy(ABC):
    """Decides levels of sealed pages outside the recent windows, the sinks and the continuation points.

    Those three are at level 32 by design and no policy touches them. A policy sees pages when they leave the last of
    them, with their int8 rows still whole, and is asked again for an order when the hot pool needs space. Decisions depend
    only on arguments and on the policy's own counters, so every tensor-parallel rank decides alike.
    """

    name: str

    by_mass = False
    """Whether levels and rows follow attention mass, which costs a table of it. Such a policy has `levels`."""

    @abstractmethod
    def settle(self, pages: np.ndarray) -> int:
        """Level for pages that no window needs any more.

        Args:
            pages: int64 [N], page numbers, at level 32 now.

        Returns:
            One of LEVELS, for all of them. The pool may lower it later, never raise it.
        """

    def choose_rows(self, page: int, level: int, layers: int, kv_heads: int, page_tokens: int) -> torch.Tensor:
        """Rows that a page keeps when it goes from level 32 to a level between 0 and 32.

        Returns:
            int64 [layers, kv_heads, level], ascending and distinct along the last axis.

        Raises:
            NotImplementedError: by policies that never settle on a level between 0 and 32.
        """
        raise NotImplementedError(f"policy {self.name} keeps whole pages or none; it never chooses {level} rows of a page")

    def levels(
        self, held: np.ndarray, mass: np.ndarray, blocks: int, lowest: int | np.ndarray = 0, reach: np.ndarray | None = None
    ) -> np.ndarray:
        """Levels of pages that share a budget, by their attention mass; see AttentionPolicy.

        Raises:
            NotImplementedError: by policies that do not go by mass.
        """
        raise NotImplementedError(f"policy {self.name} does not go by attention mass")

    def demotion_order(self, pages: np.ndarray, last_use: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Order in which settled pages give up their hot rows under pressure: least recently read first, then the
        page nearest to the start of its sequence (furthest from the recent window).

        Args:
            pages, last_use, position: int64 [N]; forward count of the last read, and page index in its sequence.

        Returns:
            int64 [N], a permutation of range(N), first to go first.
        """
        return np.lexsort((pages, position, last_use))
