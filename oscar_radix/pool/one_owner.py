"""Blocks and slots have one owner each: a free list or a page."""

import numpy as np


def check_one_owner(free: np.ndarray, held: np.ndarray, capacity: int, what: str) -> None:
    """Recount owners.

    Args:
        free: int [F], numbers on the free list.
        held: int [N], numbers that pages hold.
        capacity: how many there are.
        what: what they are, in the plural.

    Raises:
        RuntimeError: naming the first that have not exactly one owner.
    """
    owners = np.bincount(np.concatenate([free, held]).astype(np.int64), minlength=capacity)
    if (owners != 1).any():
        wrong = np.flatnonzero(owners != 1)
        raise RuntimeError(f"{len(wrong)} of {capacity} {what} have {owners[wrong][:4]} owners, not 1; first: {wrong[:4]}")
