"""Split a byte budget into page records, hot pool and tables."""

from dataclasses import dataclass

from oscar_radix.codec.layout import RecordLayout
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.pool.base_records import BaseRecords
from oscar_radix.pool.heat import PageHeat
from oscar_radix.pool.host_store import HostStore
from oscar_radix.pool.hot_pool import PAGE_BLOCKS, HotPool
from oscar_radix.pool.mass import MassTable
from oscar_radix.pool.mass_levels import SLOT_BLOCKS
from oscar_radix.pool.pages import PageTable
from oscar_radix.pool.sample_storage import SampleStorage

LARGEST_HOT_SHARE = 0.5
"""A hot pool that must be larger than this to hold its fresh pages means that the budget is too small for the load."""


@dataclass(frozen=True)
class PoolSizes:
    """What the budget buys. `pages` are usable ones; page 0 comes on top and is paid for."""

    budget_bytes: int
    bf16_bytes_per_token: int
    pages: int
    hot_blocks: int
    sampled_queries: int = 0
    """That have room at fixed addresses."""
    host_pages: int = 0
    """Whose int8 rows have room in host memory, which is not part of the budget."""

    @property
    def tokens(self) -> int:
        """Token capacity."""
        return self.pages * PAGE_TOKENS

    @property
    def bf16_tokens(self) -> int:
        """Tokens that the same bytes hold in bf16."""
        return self.budget_bytes // self.bf16_bytes_per_token

    @property
    def capacity_ratio(self) -> float:
        """Token capacity over that of bf16 at the same bytes."""
        return self.tokens / (self.budget_bytes / self.bf16_bytes_per_token)

    @property
    def hot_pages(self) -> int:
        """Whole pages that the hot pool can hold."""
        return self.hot_blocks // PAGE_BLOCKS


def split_budget(
    budget_bytes: int,
    geometry: Geometry,
    layout: RecordLayout,
    hot_fraction: float,
    parameter_bytes: int,
    running_requests: int | None,
    prefill_tokens: int | None,
    by_mass: bool = False,
    graphs: bool = False,
    refined: int = 0,
) -> PoolSizes:
    """Sizes of the pools for `budget_bytes`, all of it counted: records, hot pool, tables, codec parameters.

    The hot pool takes `hot_fraction` of the budget, and at least one fresh page for each running request plus one prefill
    chunk, as far as those are known.

    Args:
        budget_bytes: what a bf16 cache would have taken.
        geometry: attention shape of this rank.
        layout: bytes of a base record.
        hot_fraction: share of the budget for hot rows.
        parameter_bytes: bytes of the codec's bases and steps.
        running_requests: the user's limit; None when there is none (the server then admits what the hot pool carries).
        prefill_tokens: tokens of one prefill chunk; None when prefill is not chunked.
        by_mass: the policy goes by attention mass, whose table shares the hot pool's part of the budget.
        graphs: decode steps replay from CUDA graphs, so that such a policy keeps sampled queries at fixed addresses.
        refined: layers that keep low bits beside their records.

    Raises:
        ValueError: when the budget is too small, with what was asked and what is possible.
    """
    # With its part of a mass slot.
    block = HotPool.block_bytes(geometry) + (-(-MassTable.slot_bytes(geometry) // SLOT_BLOCKS) if by_mass else 0)
    page = BaseRecords.page_bytes(geometry, layout, refined) + HotPool.table_bytes_per_page(geometry) + PageTable.bytes_per_page()
    page += MassTable.bytes_per_page() + PageHeat.bytes_per_page() if by_mass else 0
    wanted_pages = (running_requests or 1) + -(-(prefill_tokens or 0) // PAGE_TOKENS)
    hot_blocks = max(int(budget_bytes * hot_fraction) // block, wanted_pages * PAGE_BLOCKS)
    if hot_blocks * block > LARGEST_HOT_SHARE * budget_bytes:
        possible = int(LARGEST_HOT_SHARE * budget_bytes) // (block * PAGE_BLOCKS)
        raise ValueError(
            f"the KV budget of {budget_bytes / 2**20:.1f} MiB has room for {possible} fresh pages in half of it, but "
            f"{running_requests or 1} running requests and a prefill chunk of {prefill_tokens or 0} tokens ask for {wanted_pages}: "
            f"lower --max-running-requests or --chunked-prefill-size, or raise --mem-fraction-static or --max-total-tokens"
        )
    sampled_queries = SampleStorage.queries_for(geometry, budget_bytes) if by_mass and graphs else 0
    sample_bytes = SampleStorage.bytes_of(geometry, sampled_queries)
    pages = (budget_bytes - hot_blocks * block - parameter_bytes - sample_bytes) // page - 1
    if pages < 1:
        sampled = f"; sampled queries {sample_bytes / 2**20:.1f} MiB" if sampled_queries else ""
        raise ValueError(
            f"the KV budget of {budget_bytes / 2**20:.1f} MiB is used up by the hot pool ({hot_blocks * block / 2**20:.1f} MiB) and "
            f"the codec's parameters ({parameter_bytes / 2**20:.1f} MiB{sampled}); one page takes {page / 2**20:.3f} MiB: raise "
            f"--mem-fraction-static or --max-total-tokens"
        )
    return PoolSizes(budget_bytes, geometry.kv_elements_per_token * 2, pages, hot_blocks, sampled_queries)


def host_pages(host_gib: float, ranks: int, geometry: Geometry, pages: int, window_pages: int) -> int:
    """Pages whose int8 copies this rank's share of host memory holds; not more than there are.

    Args:
        host_gib: GiB of host memory for the ranks of this machine together; 0: none.
        ranks: ranks on this machine.
        geometry: attention shape of this rank.
        pages: usable pages.
        window_pages: pages of a recent window and its sinks.

    Raises:
        ValueError: when the share is too small for one window, with what was asked and what it takes.
    """
    if not host_gib:
        return 0
    page = HostStore.page_bytes(geometry)
    possible = int(host_gib * 2**30) // ranks // page
    if possible < window_pages:
        needed = window_pages * page * ranks / 2**30
        raise ValueError(
            f"--oscar-host-gib {host_gib} holds {possible} pages on each of {ranks} ranks, but the window and sinks of one reader are "
            f"{window_pages}: give it {needed:.3f} GiB or more, or 0"
        )
    return min(possible, pages)
