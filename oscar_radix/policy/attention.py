"""Policy `attention`: rows that readers look at stay, on many pages a few."""

import numpy as np

from oscar_radix.policy.base import Policy

STEPS = ((2, 1, 1.0), (4, 1, 0.08), (8, 2, 0.03))
"""Level, blocks that it takes beyond the level below, and what one of these blocks is worth beside a page's first.

From the fall of the KL with the number of hot rows a page (.040 without, .0093 with 2, .0067 with 4): a page's third row is worth another
page's first one only when twelve times the mass lies on its page."""

HYSTERESIS = 1.5
"""A page that holds its rows already gives them up only for pages with this many times its mass."""


class AttentionPolicy(Policy):
    """Settles pages at the highest level while there is room, and lets those of least mass per byte fall below when there is none.

    Which rows of a page stay is the mass table's to say; levels come from `levels`.
    """

    name = "attention"
    by_mass = True

    def settle(self, pages: np.ndarray) -> int:
        """Level with room for all."""
        return STEPS[-1][0]

    def levels(
        self, held: np.ndarray, mass: np.ndarray, blocks: int, lowest: int | np.ndarray = 0, reach: np.ndarray | None = None
    ) -> np.ndarray:
        """Levels under a budget, by mass per byte.

        Args:
            held: int [N], levels now. 32 is a whole page that no window needs any more.
            mass: float [N], attention mass of each page over all layers, heads and readers (with tensor parallelism: over all ranks).
                NaN: not known yet; taken as the mean of the known ones.
            blocks: hot blocks for all of these pages together.
            lowest: no page that holds this many rows falls below them, whatever `blocks` says; int, or int [N].
            reach: int [N], levels to which pages can rise; None: none rises.

        Returns:
            int64 [N], one of 0, 2, 4, 8 each.
        """
        known = mass[~np.isnan(mass)]
        mass = np.where(np.isnan(mass), known.mean(dtype=np.float64) if len(known) else 1.0, mass).astype(np.float64)
        level, cost, worth = (np.array(column) for column in zip(*STEPS, strict=True))
        has = level <= held[:, None]
        value = mass[:, None] * worth * np.where(has & (held < 32)[:, None], HYSTERESIS, 1.0)
        value[has & (level <= np.broadcast_to(lowest, len(held))[:, None])] = np.inf
        possible = has if reach is None else has | (level <= reach[:, None])
        step, page = np.nonzero(possible.T)
        value, cost = value[page, step], cost[step]
        # Best first; equal values: lower steps first, then lower pages. What is surely in or out need not be sorted.
        least = _smallest_affordable(value, cost, blocks)
        better = value > least
        equal = np.flatnonzero(value == least)
        spent = cost[better].sum() + np.cumsum(cost[equal])
        taken = np.concatenate([np.flatnonzero(better), equal[(spent <= blocks) | np.isinf(least)]])
        # A page's steps are worth less and less, so whatever is taken best first, no page has a step without those below it.
        result = np.zeros(len(held), dtype=np.int64)
        np.maximum.at(result, page[taken], level[step[taken]])
        return result


def _smallest_affordable(value: np.ndarray, cost: np.ndarray, blocks: int) -> float:
    """The value, of those given (float64 [N], costs int [N]), at which `blocks` are spent if the best go first; -inf if all fit."""
    each = np.repeat(value, cost)
    place = len(each) - 1 - max(blocks, 0)
    if place < 0:
        return -np.inf
    return np.partition(each, place)[place]
