"""Attention mass of pages as a store holds it: the table on the device, and what the host knows of it."""

from dataclasses import dataclass

import numpy as np

from oscar_radix.pool.heat import PageHeat
from oscar_radix.pool.mass import MassTable
from oscar_radix.pool.sample_storage import SampleStorage


@dataclass(frozen=True)
class MassParts:
    """Table and heat follow the pages: whoever frees, empties or moves one says so here."""

    table: MassTable
    heat: PageHeat
    storage: SampleStorage | None = None
    """Where sampled queries are kept; None where every sampled forward takes memory of its own, on a CPU."""

    def forget(self, pages: np.ndarray) -> None:
        """`pages` (int64 [N]) are freed."""
        self.table.drop(pages)
        self.heat.forget(pages)

    def clear(self) -> None:
        """All pages are freed."""
        self.table.clear()
        self.heat.clear()

    def take_over(self, duplicate: int, original: int) -> None:
        """`original` has the rows of `duplicate` now, the same tokens. The mass of an original that is watched is that of all its
        readers, and stays."""
        if self.table.slots[original] < 0:
            self.table.move(duplicate, original)
        else:
            self.table.drop(np.array([duplicate]))
        self.heat.move(duplicate, original)

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return self.table.nbytes + self.heat.nbytes + (self.storage.nbytes if self.storage else 0)

    def check_integrity(self, watchable: np.ndarray) -> None:
        """Every slot is free or one page's, and that page holds hot rows, or has a copy that it can get some from.

        Args:
            watchable: bool [pages].

        Raises:
            RuntimeError: naming the first slots or the first page for which it is not so.
        """
        self.table.check_integrity()
        cold = np.flatnonzero((self.table.slots >= 0) & ~watchable)
        if len(cold):
            raise RuntimeError(f"{len(cold)} pages without hot rows hold mass slots; first: page {cold[0]}")
