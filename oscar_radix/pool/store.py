"""The store: base records and hot pool of all layers, with the states and owners of their pages."""

from typing import Any

import numpy as np
import torch

from oscar_radix.codec.base import Codec
from oscar_radix.codec.layout import RecordLayout
from oscar_radix.config import OscarConfig
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.policy.base import LEVELS, Policy
from oscar_radix.pool.base_records import BaseRecords
from oscar_radix.pool.heat import PageHeat
from oscar_radix.pool.host_copies import HostCopies
from oscar_radix.pool.host_store import HostStore
from oscar_radix.pool.hot_pool import PAGE_BLOCKS, HotPool, Rows
from oscar_radix.pool.mass import MassTable
from oscar_radix.pool.mass_levels import SLOT_BLOCKS
from oscar_radix.pool.mass_parts import MassParts
from oscar_radix.pool.pages import Owner, PageTable
from oscar_radix.pool.request_pages import RequestPages
from oscar_radix.pool.residency import Residency
from oscar_radix.pool.sample_storage import SampleStorage


class KVStore:
    """Pages of 32 slots; slot s is token s % 32 of page s // 32, whatever its precision. Page 0 is padding.

    A page's life: FREE -> (allocate) REQUEST, fresh: int8 rows only -> sealed: 2-bit record, rows still whole -> level
    32 / 8 / 4 / 2 / 0 -> (free) FREE; (enter_tree) moves it from REQUEST to TREE on the way.

    Args:
        geometry: attention shape of this rank.
        layout: bytes of a base record.
        pages: usable pages (page 0 comes on top).
        hot_blocks: blocks of the hot pool.
        policy: settles pages that leave every window.
        recent_tokens: W.
        device: where the buffers live.
        policy_interval: forwards between two decisions of a policy that goes by attention mass.
        hot_rows: int8 rows that pages which are read keep on average, for such a policy.
        sampled_queries: room at a fixed place for queries of a sampled forward, for such a policy; 0: each takes its own.
        host_pages: pages whose int8 rows the host store has room for.
        refined: layers that keep low bits beside their records; the codec has as many or none.
    """

    def __init__(
        self,
        geometry: Geometry,
        layout: RecordLayout,
        pages: int,
        hot_blocks: int,
        policy: Policy,
        recent_tokens: int,
        device: torch.device | str,
        policy_interval: int = OscarConfig.policy_interval,
        hot_rows: float = OscarConfig.hot_rows,
        sampled_queries: int = 0,
        host_pages: int = 0,
        refined: int = 0,
    ):
        self.geometry = geometry
        self.layout = layout
        self.device = torch.device(device)
        self.pages = pages
        self.refined = refined
        self.base = BaseRecords(geometry, layout, pages + 1, device, refined)
        self.hot = HotPool(geometry, pages + 1, hot_blocks, device)
        self.table = PageTable(pages + 1)
        self.requests = RequestPages()
        self.mass: MassParts | None = None
        if policy.by_mass:
            table = MassTable(geometry, pages + 1, max(1, hot_blocks // SLOT_BLOCKS), device)
            storage = SampleStorage.empty(geometry, sampled_queries, device) if sampled_queries else None
            self.mass = MassParts(table, PageHeat(table, pages + 1), storage)
        self.copies: HostCopies | None = None
        if host_pages:
            self.copies = HostCopies(self.table, self.hot, HostStore(self.hot, geometry, pages + 1, host_pages))
        self.residency = Residency(geometry, self.table, self.hot, policy, recent_tokens, self.mass, policy_interval, hot_rows, self.copies)
        self.codec: Codec | None = None
        self.adopted = 0
        """Pages of the tree that became whole again by rows of a duplicate."""
        self.bad_rows = torch.zeros(1, dtype=torch.int32, device=device)
        """Rows of K or V with NaN or Inf, over all layers and heads; counted on the device."""
        self._polled = torch.zeros(1, dtype=torch.int32, pin_memory=self.device.type == "cuda")

    # Ownership -------------------------------------------------------------------------------------------------------

    def allocate(self, pages: np.ndarray) -> None:
        """The free list gives pages (int64 [N], distinct) to a running request."""
        self.table.transfer(pages, (Owner.FREE,), Owner.REQUEST)
        self.table.forget(pages)

    def enter_tree(self, pages: np.ndarray) -> None:
        """A running request's full pages become the radix tree's.

        Raises:
            RuntimeError: when one of them is not sealed; a partial page never enters the tree.
        """
        unsealed = pages[~self.table.sealed[pages]]
        if len(unsealed):
            raise RuntimeError(f"{len(unsealed)} of {len(pages)} pages that enter the tree are not sealed; first: {unsealed[0]}")
        self.table.transfer(pages, (Owner.REQUEST,), Owner.TREE)

    def free(self, pages: np.ndarray) -> None:
        """A request's or the tree's pages return to the free list; their hot rows are dropped."""
        self.table.transfer(pages, (Owner.REQUEST, Owner.TREE), Owner.FREE)
        self.hot.release(pages[self.hot.levels[pages] > 0])
        self.table.forget(pages)
        if self.mass:
            self.mass.forget(pages)
        if self.copies:
            self.copies.host.forget(pages)

    def clear(self) -> None:
        """All pages to the free list, all hot blocks too."""
        self.hot.clear()
        if self.mass:
            self.mass.clear()
        if self.copies:
            self.copies.host.clear()
        self.requests.clear()
        self.residency.marks.forget()
        self.table.owner.fill(Owner.FREE)
        self.table.forget(np.arange(self.table.count))

    def adopt_hot_rows(self, duplicates: np.ndarray, originals: np.ndarray) -> int:
        """The tree's pages take the hot rows of recomputed duplicates of the same tokens, where they lack their own.

        Args:
            duplicates, originals: int64 [N], page by page the same tokens.

        Returns:
            Number of pages that took rows.
        """
        wanted = (self.hot.levels[duplicates] == PAGE_TOKENS) & (self.hot.levels[originals] < PAGE_TOKENS) & self.table.sealed[duplicates]
        for duplicate, original in zip(duplicates[wanted].tolist(), originals[wanted].tolist(), strict=True):
            if self.hot.levels[original]:
                self.hot.release(original)
            self.hot.move(duplicate, original)
            if self.mass:
                self.mass.take_over(duplicate, original)
            self.table.window[original] = self.table.window[duplicate]
            self.table.prefilling[original] |= self.table.prefilling[duplicate]
            self.table.last_use[original] = self.table.last_use[duplicate]
        if wanted.any():
            self.residency.marks.forget()
        if self.copies:
            self.copies.take_over(duplicates, originals)
        self.adopted += int(wanted.sum())
        return int(wanted.sum())

    def set_continuation_points(self, pages: np.ndarray, ends: list[int], recent_pages: int) -> None:
        """Later readers continue at `ends` of a sequence, and nowhere else in it: pages before them stay hot as long as the pool allows.

        Args:
            pages: int64 [N], the sequence's full pages in order.
            ends: numbers of pages, the last one the sequence's end.
            recent_pages: pages of a recent window.
        """
        wanted = np.zeros(len(pages), dtype=bool)
        for end in ends:
            wanted[max(0, end - recent_pages) : end] = True
        self.table.continuation[pages] = wanted & (self.is_whole(pages) | self.table.continuation[pages])
        self.touch(pages)
        window = pages[-recent_pages:]
        self.table.last_use[window[self.is_whole(window)]] = self.residency.now
        self.residency.marks.forget()

    def want_continuation(self, pages: np.ndarray) -> None:
        """A reader would have continued after these pages, were they hot: once they are again, they stay."""
        self.table.continuation[pages] = True

    def end_prefill(self, pages: np.ndarray) -> None:
        """The prompt on these pages is prefilled, or given up."""
        self.table.prefilling[pages] = False
        self.residency.marks.forget()

    def is_whole(self, pages: np.ndarray) -> np.ndarray:
        """bool [N]: the page's 32 tokens are all at int8."""
        return self.hot.levels[pages] == PAGE_TOKENS

    def can_be_whole(self, pages: np.ndarray) -> np.ndarray:
        """bool [N]: the page's 32 tokens are all at int8, or can be again by a copy in host memory."""
        whole = self.is_whole(pages)
        return whole | self.copies.host.holds(pages) if self.copies else whole

    def touch(self, pages: np.ndarray) -> None:
        """A reader wants these pages (int64 [N]): their copies in host memory are worth keeping."""
        if self.copies:
            self.copies.host.touch(pages, self.residency.now)

    # Data ------------------------------------------------------------------------------------------------------------

    def seal(self, layer: int, pages: torch.Tensor, rows: Rows) -> None:
        """Write the 2-bit records of `pages` (int64 [N]) from their int8 rows, each tensor [N, Hkv, 32, ...]."""
        self.base.write(layer, pages, *self.codec.seal(layer, rows.k, rows.k_scale, rows.v, rows.v_scale), self.low_place(layer))

    def records(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The 2-bit records of `pages` (int64 [N]), as `Codec.open` takes them."""
        return self.base.read(layer, pages, self.low_place(layer))

    def low_place(self, layer: int) -> int | None:
        """Where the low bits of a refined layer are; None for the others."""
        return self.codec.refined.index(layer) if layer in self.codec.refined else None

    def poll_bad_rows(self) -> int:
        """`bad_rows` without waiting for it: on a GPU, what had been counted by an earlier poll."""
        self._polled.copy_(self.bad_rows, non_blocking=True)
        return int(self._polled)

    # Accounting ------------------------------------------------------------------------------------------------------

    @property
    def allocated_bytes(self) -> dict[str, int]:
        """Bytes by what they hold, `mass` only where a policy goes by it. Host tables count too: they exist per page."""
        held = {
            "codes": self.base.code_bytes,
            "scales": self.base.scale_bytes,
            "hot_pool": self.hot.row_bytes,
            "tables": self.hot.table_bytes + self.table.nbytes,
            "codec_parameters": self.codec.parameter_bytes if self.codec else 0,
        }
        return {**held, "mass": self.mass.nbytes} if self.mass else held

    @property
    def effective_bits(self) -> float:
        """Allocated bits per K or V element of the token capacity, everything included."""
        elements = self.pages * PAGE_TOKENS * self.geometry.kv_elements_per_token
        return sum(self.allocated_bytes.values()) * 8 / elements

    def usage_by_level(self) -> dict[str, dict[str, int]]:
        """Tokens and bytes of owned pages by level; `fresh` pages have no 2-bit record yet."""
        owned = self.table.owner != Owner.FREE
        owned[0] = False
        record = BaseRecords.page_bytes(self.geometry, self.layout, self.refined)
        block = HotPool.block_bytes(self.geometry)
        usage = {}
        for level in LEVELS:
            count = int((owned & self.table.sealed & (self.hot.levels == level)).sum())
            usage[str(level)] = {"tokens": count * PAGE_TOKENS, "bytes": count * (record + block * level // 2)}
        fresh = int((owned & ~self.table.sealed).sum())
        usage["fresh"] = {"tokens": fresh * PAGE_TOKENS, "bytes": fresh * (record + block * PAGE_BLOCKS)}
        return usage

    def describe_pages(self, pages: np.ndarray) -> dict[str, Any]:
        """Of pages int64 [N]: how many are at each level, how many have copies in host memory (None without such), and their attention mass
        as of the last decision, None where none is known."""
        counts = np.bincount(self.hot.levels[pages], minlength=LEVELS[-1] + 1)
        levels = {str(level): int(counts[level]) for level in LEVELS}
        known = self.mass.heat.values[pages] if self.mass else np.zeros(0, dtype=np.float32)
        known = known[~np.isnan(known)]
        copied = int(self.copies.host.holds(pages).sum()) if self.copies else None
        return {"levels": levels, "copied": copied, "mass": float(known.sum()) if len(known) else None}
