"""What the host knows of pages' mass: sums that the device makes at fixed forward counts and sends without anybody waiting."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from oscar_radix.pool.mass import MassTable


@dataclass
class _Sent:
    """Sums under way: of which page each slot was, up to which slot they count, and when they have arrived."""

    pages: np.ndarray
    slots: np.ndarray
    total_given: int
    arrived: "torch.cuda.Event | None"


class PageHeat:
    """Mass of whole pages as of the last sums that have arrived.

    `send` sums on the device and starts a copy, `receive` reads it some forwards later. Both are called at forward counts that
    depend on nothing else, so that every tensor-parallel rank has the same numbers in the same forward. A rank's mass is that of its own
    heads: with more than one rank, `reduce` must make the sums those of all ranks, bit by bit the same on each.

    Args:
        mass: where mass is added up.
        pages: page numbers, page 0 included.
    """

    def __init__(self, mass: MassTable, pages: int):
        self.mass = mass
        self.values = np.full(pages, np.nan, dtype=np.float32)
        """float32 [pages]; NaN: not known yet."""
        self.reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
        """Sum of a float32 [slots + 1] tensor over all tensor-parallel ranks, in order with the current stream."""
        self.measured = np.zeros(pages, dtype=bool)
        """Pages that held a slot when the sums were made that have arrived last: their rows' mass is known, too."""
        self.covered_share = float("nan")
        """Share of the tracked pages' mass that lay on hot rows; NaN until the first sums have arrived."""
        self.decay = 1.0
        """What is left of mass at each `send`, and of the known mass of a page without a slot at each `receive`."""
        self._copy = torch.zeros(mass.capacity + 1, pin_memory=mass.device.type == "cuda")
        self._sent: _Sent | None = None

    def send(self, row_masks: torch.Tensor) -> None:
        """Sum every slot's mass, and that of hot rows, let all mass decay, and start the copy of the sums to the host."""
        sums = self.mass.sum_and_decay(row_masks, self.decay)
        if self.reduce is not None:
            sums = self.reduce(sums)
        self._copy.copy_(sums, non_blocking=True)
        arrived = None
        if self.mass.device.type == "cuda":
            arrived = torch.cuda.Event()
            arrived.record()
        pages = np.flatnonzero(self.mass.slots >= 0)
        self._sent = _Sent(pages, self.mass.slots[pages], self.mass.total_given, arrived)

    def receive(self) -> bool:
        """Take over what was sent; False when nothing was. Waits only if the copy has not run yet, which it has after a few forwards."""
        sent, self._sent = self._sent, None
        if sent is None:
            return False
        if sent.arrived is not None:
            sent.arrived.synchronize()
        sums = self._copy.numpy()
        mass = self.mass
        # Slots move from page to page, and come back; only a page that has held the same slot all the time has this mass.
        pages = np.flatnonzero(mass.slots >= 0)
        slots = mass.slots[pages]
        old = mass.given[slots] <= sent.total_given
        self.values[mass.slots < 0] *= self.decay
        self.values[pages[old]] = sums[slots[old]]
        self.measured[:] = False
        self.measured[pages[old]] = True
        total = float(sums[sent.slots].sum())
        self.covered_share = float(sums[-1]) / total if total > 0 else float("nan")
        return True

    def forget(self, pages: np.ndarray) -> None:
        """Nothing is known of `pages` (int64 [N]) any more: they are freed."""
        self.values[pages] = np.nan
        self.measured[pages] = False

    def move(self, source: int, target: int) -> None:
        """Pages of the same tokens: `target` takes the larger of both, `source` nothing."""
        self.values[target] = np.fmax(self.values[source], self.values[target])
        self.values[source] = np.nan
        self.measured[[source, target]] = False

    def clear(self) -> None:
        """Nothing is known of any page; what is under way is lost."""
        self.values.fill(np.nan)
        self.measured.fill(False)
        self._sent = None

    @staticmethod
    def bytes_per_page() -> int:
        """Bytes of one page's entry."""
        return 5

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return self.values.nbytes + self.measured.nbytes
