"""Attention mass of a bounded set of pages, in slots that pages come by and give back."""

import numpy as np
import torch

from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.pool.free_list import FreeList
from oscar_radix.pool.one_owner import check_one_owner
from oscar_radix.pool.upload import upload, upload_all


class MassTable:
    """Mass float32 [layers, slots, Hkv, 32] and visits float32 [slots, 32] of the pages that hold a slot.

    Mass matters for pages whose rows may still be chosen, so the number of slots is a choice; a slot takes 4 bytes a token, layer and
    KV head, 5.9 % of a record at head dim 128. float32, since GPUs add single 16-bit values by compare-and-swap loops only.
    A token's mass is the sum, over sampled queries and the heads of a GQA group, of its attention probability; its visits
    are the queries that could see it. The host alone knows which slot is whose.

    Args:
        geometry: attention shape of this rank.
        pages: page numbers, page 0 (padding, never tracked) included.
        slots: pages that can be tracked at a time.
        device: where the buffers live.
    """

    def __init__(self, geometry: Geometry, pages: int, slots: int, device: torch.device | str):
        if slots < 1:
            raise ValueError(f"a mass table needs a slot at least, not {slots}")
        self.device = torch.device(device)
        self.capacity = slots
        self.values = torch.zeros(geometry.layers, slots, geometry.kv_heads, PAGE_TOKENS, dtype=torch.float32, device=device)
        self.visits = torch.zeros(slots, PAGE_TOKENS, dtype=torch.float32, device=device)
        self.slots = np.full(pages, -1, dtype=np.int32)
        self.given = np.zeros(slots, dtype=np.int64)
        """For each slot, how many had been given when it was given last: tells two holders of a slot apart."""
        self.total_given = 0
        self.free = FreeList(np.arange(slots))

    # Ownership -------------------------------------------------------------------------------------------------------

    @property
    def free_slots(self) -> int:
        """Slots that no page holds."""
        return len(self.free)

    def track(self, pages: np.ndarray) -> np.ndarray:
        """Give empty slots to pages that hold none, in order, as long as there are any.

        Args:
            pages: int64 [N], distinct, without page 0.

        Returns:
            bool [N], the pages that hold a slot now.
        """
        if (pages == 0).any():
            raise ValueError("page 0 is padding; its attention means nothing")
        new = pages[self.slots[pages] < 0][: len(self.free)]
        if len(new):
            taken = self.free.take(len(new))
            self.slots[new] = taken
            self.given[taken] = self.total_given + 1 + np.arange(len(new))
            self.total_given += len(new)
            index = upload(taken, self.device)
            self.values.index_fill_(1, index, 0.0)
            self.visits.index_fill_(0, index, 0.0)
        return self.slots[pages] >= 0

    def drop(self, pages: np.ndarray) -> None:
        """Take back the slots of those of `pages` (int64 [N]) that hold one; their mass is forgotten."""
        held = pages[self.slots[pages] >= 0]
        self.free.give_back(self.slots[held])
        self.slots[held] = -1

    def move(self, source: int, target: int) -> None:
        """Page `target` takes the slot of page `source` and gives back its own: both hold the same tokens."""
        self.drop(np.array([target]))
        self.slots[target], self.slots[source] = self.slots[source], -1

    def clear(self) -> None:
        """All slots to the free list."""
        self.slots.fill(-1)
        self.free = FreeList(np.arange(self.capacity))

    # Mass ------------------------------------------------------------------------------------------------------------

    def sum_and_decay(self, row_masks: torch.Tensor, factor: float) -> torch.Tensor:
        """`slot_mass` and `covered_mass`, float32 [slots + 1] on the device; then `decay`. On a GPU in one pass over the table."""
        if self.device.type == "cpu":
            sums = torch.cat([self.slot_mass(), self.covered_mass(row_masks)])
            self.decay(factor)
            return sums
        from oscar_radix.kernels.mass_sums import sum_and_decay  # Triton is needed on GPUs only

        sums = torch.zeros(self.capacity + 1, device=self.device)
        sum_and_decay(self.values, row_masks, *self._tracked(), sums, factor)
        self.visits *= factor
        return sums

    def decay(self, factor: float) -> None:
        """Multiply all mass and all visits by `factor`: old readers count less, and the mass per visit stays."""
        self.values *= factor
        self.visits *= factor

    def row_scores(self, pages: np.ndarray) -> torch.Tensor:
        """Mass per query that could see the token: float32 [N, layers, Hkv, 32], 0 without visits and for pages without a slot."""
        slots, held = self._held(pages)
        visits = self.visits[slots][:, None, None, :]
        return torch.where(held[:, None, None, None] & (visits > 0), self.values[:, slots].transpose(0, 1) / visits, 0.0)

    def page_mass(self, pages: np.ndarray) -> torch.Tensor:
        """Mass of whole pages over all layers, heads and readers, not divided by visits: float32 [N], 0 for pages without a slot."""
        slots, held = self._held(pages)
        return torch.where(held, self.values[:, slots].sum(dim=(0, 2, 3)), 0.0)

    def slot_mass(self) -> torch.Tensor:
        """Mass of every slot over all layers and heads, on the device without the host: float32 [slots]; a free slot's means nothing."""
        return self.values.sum(dim=(0, 2, 3))

    def covered_mass(self, row_masks: torch.Tensor) -> torch.Tensor:
        """How much of the tracked pages' mass lies on tokens that are hot.

        Args:
            row_masks: int32 [layers, pages, Hkv], bit i: token i is hot.

        Returns:
            float32 [1] on the device.
        """
        index, slots = self._tracked()
        bits = torch.arange(PAGE_TOKENS, dtype=torch.int32, device=self.device)
        covered = torch.zeros(1, device=self.device)
        for layer in range(len(self.values)):  # a layer at a time: the whole is as large as the table
            hot = (row_masks[layer, index][..., None] >> bits) & 1
            covered += (self.values[layer, slots] * hot).sum()
        return covered

    def _tracked(self) -> list[torch.Tensor]:
        """All pages that hold a slot, and their slots: int64 [N] each, on the device."""
        pages = np.flatnonzero(self.slots >= 0)
        return upload_all([pages, self.slots[pages].astype(np.int64)], self.device)

    def _held(self, pages: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        slots = upload(self.slots[pages].astype(np.int64), self.device)
        return slots.clamp(min=0), slots >= 0

    # Bytes -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def slot_bytes(geometry: Geometry) -> int:
        """Bytes of one slot: mass of all layers and heads, visits, when it was given."""
        return (geometry.layers * geometry.kv_heads + 1) * PAGE_TOKENS * 4 + 8

    @staticmethod
    def bytes_per_page() -> int:
        """Bytes of a page's entry in the table of slots."""
        return 4

    @property
    def nbytes(self) -> int:
        """Bytes of mass, visits and the table of slots."""
        return self.values.nbytes + self.visits.nbytes + self.given.nbytes + self.slots.nbytes

    def check_integrity(self) -> None:
        """Every slot is free or one page's.

        Raises:
            RuntimeError: naming the first slots that have not exactly one owner.
        """
        check_one_owner(self.free.numbers, self.slots[self.slots >= 0], self.capacity, "mass slots")
