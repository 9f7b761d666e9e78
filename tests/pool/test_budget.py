"""The budget is split to the byte, and what does not fit is said with both numbers."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.budget import LARGEST_HOT_SHARE, PoolSizes, host_pages, split_budget
from oscar_radix.codec import DEFAULT_RECIPE, RECIPES, get_recipe
from oscar_radix.codec.parameters import parameter_bytes
from oscar_radix.config import OscarConfig
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.policy import POLICIES
from oscar_radix.pool.base_records import BaseRecords
from oscar_radix.pool.heat import PageHeat
from oscar_radix.pool.host_store import HostStore
from oscar_radix.pool.hot_pool import PAGE_BLOCKS, HotPool
from oscar_radix.pool.mass import MassTable
from oscar_radix.pool.pages import PageTable
from oscar_radix.pool.sample_storage import SampleStorage
from oscar_radix.pool.store import KVStore
from tests.helpers import make_codec

SMALL = Geometry(layers=2, kv_heads=3, query_heads=6, head_dim=64)
MIB = 2**20


def split(
    budget: int,
    geometry: Geometry = SMALL,
    recipe: str = DEFAULT_RECIPE,
    hot_fraction: float = 0.12,
    by_mass: bool = False,
    refined: int = 0,
    **load: int,
) -> PoolSizes:
    chosen = get_recipe(recipe)
    load = {"running_requests": None, "prefill_tokens": None, **load}
    layout, parameters = chosen.layout(geometry.head_dim), parameter_bytes(chosen, geometry)
    return split_budget(budget, geometry, layout, hot_fraction, parameters, **load, by_mass=by_mass, refined=refined)


def store_of(sizes: PoolSizes, geometry: Geometry, recipe: str, policy: str = "window", refined: int = 0) -> KVStore:
    layout = get_recipe(recipe).layout(geometry.head_dim)
    store = KVStore(geometry, layout, sizes.pages, sizes.hot_blocks, POLICIES[policy](), 64, "cpu", refined=refined)
    store.codec = make_codec(recipe, geometry)
    return store


@settings(max_examples=40, deadline=None)
@given(
    budget=st.integers(2 * MIB, 12 * MIB),
    recipe=st.sampled_from(list(RECIPES)),
    hot_fraction=st.floats(0.05, 0.5),
    refined=st.integers(0, 2),
)
def test_allocated_bytes_fit_and_leave_less_than_a_page(budget, recipe, hot_fraction, refined):
    """Counted from the tensors of a real store: records, hot pool, tables and codec parameters."""
    sizes = split(budget, recipe=recipe, hot_fraction=hot_fraction, refined=refined)
    store = store_of(sizes, SMALL, recipe, refined=refined)
    held = store.allocated_bytes
    layout = get_recipe(recipe).layout(SMALL.head_dim)
    record = BaseRecords.page_bytes(SMALL, layout, refined)
    page = record + HotPool.table_bytes_per_page(SMALL) + PageTable.bytes_per_page()
    used = (sizes.pages + 1) * page + sizes.hot_blocks * HotPool.block_bytes(SMALL) + parameter_bytes(get_recipe(recipe), SMALL)
    assert sum(held.values()) == used
    assert used <= budget < used + page
    assert held["hot_pool"] == sizes.hot_blocks * HotPool.block_bytes(SMALL)
    assert held["codes"] + held["scales"] == (sizes.pages + 1) * record


@settings(max_examples=20, deadline=None)
@given(budget=st.integers(2 * MIB, 12 * MIB), hot_fraction=st.floats(0.05, 0.5))
def test_the_mass_table_is_paid_for_by_the_hot_pools_share(budget, hot_fraction):
    """Its slots within that share, its entries for pages like other tables; a few bytes of rounding for each hot block."""
    sizes = split(budget, hot_fraction=hot_fraction, by_mass=True)
    held = store_of(sizes, SMALL, DEFAULT_RECIPE, "attention").allocated_bytes
    entry = MassTable.bytes_per_page() + PageHeat.bytes_per_page()
    entries = (sizes.pages + 1) * entry
    assert held["hot_pool"] + held["mass"] - entries <= hot_fraction * budget
    page = (held["codes"] + held["scales"] + held["tables"] + entries) / (sizes.pages + 1)
    rounding = 2 * HotPool.block_bytes(SMALL) + MassTable.slot_bytes(SMALL) + sizes.hot_blocks
    assert budget - page - rounding <= sum(held.values()) <= budget
    without = split(budget, hot_fraction=hot_fraction).pages
    assert 0 <= without - sizes.pages <= 2 + without * entry / page


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_parameter_bytes_are_known_before_calibration(recipe):
    assert parameter_bytes(get_recipe(recipe), SMALL) == make_codec(recipe, SMALL).parameter_bytes


def test_the_hot_pool_takes_its_share():
    sizes = split(64 * MIB, hot_fraction=0.25)
    assert sizes.hot_blocks == int(64 * MIB * 0.25) // HotPool.block_bytes(SMALL)


def test_the_hot_pool_holds_a_fresh_page_of_each_request_and_a_chunk():
    sizes = split(4 * MIB, hot_fraction=0.01, running_requests=5, prefill_tokens=100)
    assert sizes.hot_pages == 5 + 4
    assert sizes.hot_blocks == 9 * PAGE_BLOCKS


def test_bf16_figures():
    sizes = split(8 * MIB)
    assert sizes.bf16_bytes_per_token == 2 * 3 * 64 * 2 * 2
    assert sizes.bf16_tokens == 8 * MIB // sizes.bf16_bytes_per_token
    assert sizes.tokens == sizes.pages * PAGE_TOKENS
    assert sizes.capacity_ratio == pytest.approx(sizes.tokens / sizes.bf16_tokens, rel=1e-3)


# Capacity at default settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("geometry", "least"),
    [
        pytest.param(Geometry(layers=30, kv_heads=3, query_heads=9, head_dim=64), 5.5, id="head dim 64: SmolLM2-135M"),
        pytest.param(Geometry(layers=32, kv_heads=8, query_heads=32, head_dim=128), 6.0, id="head dim 128: Llama-3.1-8B"),
        pytest.param(Geometry(layers=36, kv_heads=8, query_heads=32, head_dim=128), 6.0, id="head dim 128: Qwen3-8B"),
    ],
)
def test_capacity_ratio(geometry, least):
    """At 40 GiB, with SGLang's usual chunk; hot pool, tables and parameters counted."""
    config = OscarConfig(recipe=DEFAULT_RECIPE)
    sizes = split(40 * 2**30, geometry, config.recipe, config.hot_fraction, prefill_tokens=8192)
    assert sizes.capacity_ratio >= least


# Errors --------------------------------------------------------------------------------------------------------------


def test_a_load_that_does_not_fit_names_what_is_asked_and_what_is_possible():
    with pytest.raises(ValueError, match=r"--max-running-requests or --chunked-prefill-size") as error:
        split(2 * MIB, running_requests=60, prefill_tokens=2048)
    possible, requests, chunk, wanted = map(int, re.findall(r"(?<![\d.])\d+(?![\d.])", str(error.value)))
    assert (requests, chunk, wanted) == (60, 2048, 60 + 64)
    assert possible == int(LARGEST_HOT_SHARE * 2 * MIB) // (PAGE_BLOCKS * HotPool.block_bytes(SMALL))
    assert "2.0 MiB" in str(error.value)
    split(2 * MIB, running_requests=possible)


def test_a_budget_without_room_for_a_page_names_what_uses_it_up():
    geometry = Geometry(layers=32, kv_heads=8, query_heads=32, head_dim=128)
    with pytest.raises(ValueError, match=r"one page takes \d\.\d{3} MiB: raise --mem-fraction-static or --max-total-tokens") as error:
        split(24 * MIB, geometry)
    assert "the KV budget of 24.0 MiB is used up by the hot pool (" in str(error.value)
    assert "and the codec's parameters (" in str(error.value)


def test_sampled_queries_take_from_the_pages_where_decode_steps_are_graphs():
    """Under a policy by mass; the hot pool keeps its size."""
    geometry = Geometry(layers=32, kv_heads=8, query_heads=32, head_dim=128)
    plain, graphs = (
        split_budget(2**30, geometry, get_recipe(DEFAULT_RECIPE).layout(128), 0.12, 0, None, None, by_mass=True, graphs=graphs)
        for graphs in (False, True)
    )
    assert plain.sampled_queries == 0
    assert graphs.sampled_queries == SampleStorage.queries_for(geometry, 2**30)
    assert graphs.hot_blocks == plain.hot_blocks
    assert graphs.pages < plain.pages


# Host memory ---------------------------------------------------------------------------------------------------------


def test_host_pages_share_what_the_ranks_of_a_machine_may_take():
    page = HostStore.page_bytes(SMALL)
    assert host_pages(0, 1, SMALL, 1000, 10) == 0
    assert host_pages(100 * page / 2**30, 1, SMALL, 1000, 10) == 100
    assert host_pages(100 * page / 2**30, 4, SMALL, 1000, 10) == 25
    assert host_pages(100 * page / 2**30, 1, SMALL, 60, 10) == 60, "there are no more pages"


def test_host_memory_too_small_for_a_window_is_refused():
    page = HostStore.page_bytes(SMALL)
    with pytest.raises(ValueError, match=r"holds 9 pages on each of 2 ranks, .* one reader are 10: give it 0\.0\d\d GiB or more, or 0"):
        host_pages(18 * page / 2**30, 2, SMALL, 1000, 10)
