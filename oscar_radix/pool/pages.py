"""State and owner of every page, on the host."""

from enum import IntEnum

import numpy as np


class Owner(IntEnum):
    """Who may free a page. The allocator's free list, a running request (its tail beyond the shared prefix), or the tree."""

    FREE = 0
    REQUEST = 1
    TREE = 2


class PageTable:
    """One row a page; page 0 is padding and has no owner.

    | column       | meaning                                                                  |
    |--------------|--------------------------------------------------------------------------|
    | owner        | Owner                                                                    |
    | sealed       | the 2-bit record exists                                                  |
    | window       | in the recent window or among the sinks of its reader's last forward     |
    | continuation | before the end of a leaf, or of a prefix that a reader branched from     |
    | prefilling   | its prompt is still being prefilled in chunks                            |
    | last_use     | forward count of the last forward that had it in a window, or wrote it   |
    | position     | index of the page in its sequence                                        |
    """

    def __init__(self, pages: int):
        self.count = pages
        self.owner = np.zeros(pages, dtype=np.uint8)
        self.sealed = np.zeros(pages, dtype=bool)
        self.window = np.zeros(pages, dtype=bool)
        self.continuation = np.zeros(pages, dtype=bool)
        self.prefilling = np.zeros(pages, dtype=bool)
        self.last_use = np.zeros(pages, dtype=np.int64)
        self.position = np.zeros(pages, dtype=np.int32)

    def transfer(self, pages: np.ndarray, allowed: tuple[Owner, ...], new_owner: Owner) -> None:
        """Change the owner of distinct pages.

        Raises:
            RuntimeError: when a page is not owned by one of `allowed` (a double free, say), or is named twice.
        """
        if len(pages) and (pages.min() < 1 or pages.max() >= self.count):
            raise RuntimeError(f"pages {pages.min()}..{pages.max()} are not all within 1..{self.count - 1}")
        if len(np.unique(pages)) != len(pages):
            raise RuntimeError(f"{len(pages)} pages are to become {new_owner.name}, but only {len(np.unique(pages))} are distinct")
        wrong = pages[~np.isin(self.owner[pages], allowed)]
        if len(wrong):
            owner = Owner(self.owner[wrong[0]]).name
            names = [owner.name for owner in allowed]
            raise RuntimeError(f"{len(wrong)} pages cannot become {new_owner.name}: page {wrong[0]} is owned by {owner}, not by {names}")
        self.owner[pages] = new_owner

    def forget(self, pages: np.ndarray) -> None:
        """Reset everything but the owner, for pages that are freed or newly allocated."""
        for column in (self.sealed, self.window, self.continuation, self.prefilling):
            column[pages] = False

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        columns = (self.owner, self.sealed, self.window, self.continuation, self.prefilling, self.last_use, self.position)
        return sum(column.nbytes for column in columns)

    @staticmethod
    def bytes_per_page() -> int:
        """Bytes of one row."""
        return PageTable(1).nbytes
