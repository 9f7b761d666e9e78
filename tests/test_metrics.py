"""What an operator sees agrees with the store, and is plain JSON."""

import json
import re

import numpy as np
import pytest
import torch

from oscar_radix.attention.backend import TorchAttention
from oscar_radix.attention.plan import plan_forward
from oscar_radix.budget import PoolSizes
from oscar_radix.config import OscarConfig
from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.metrics import MIB, Metrics
from oscar_radix.sequence import Sequence
from tests.helpers import GEOMETRY, make_store, random_qkv, take_pages

PAGES, HOT_PAGES = 20, 6


@pytest.fixture
def metrics() -> Metrics:
    """A store that has prefilled 200 tokens, one of them with a NaN key, and decoded one."""
    store = make_store(PAGES, HOT_PAGES, policy="none", refined=(1,))
    pages = take_pages(store, 7)
    attention = TorchAttention(store)
    generator = torch.Generator().manual_seed(0)
    for start, end, decode in ((0, 200, False), (200, 201, True)):
        plan = plan_forward(store, [Sequence(pages, start, end, decode)])
        for layer in range(GEOMETRY.layers):
            q, k, v = random_qkv(GEOMETRY, end - start, generator)
            if layer == 0 and not decode:
                k[3, 1, 7] = float("nan")
            attention.run(layer, q, k, v, plan, 0.125)
    budget = sum(store.allocated_bytes.values())
    sizes = PoolSizes(budget, GEOMETRY.kv_elements_per_token * 2, PAGES, store.hot.capacity)
    return Metrics(OscarConfig(recipe="tck", policy="none"), sizes, store, "made in a test")


def test_report_is_plain_json(metrics):
    report = metrics.report()
    assert json.loads(json.dumps(report)) == report


def test_report_agrees_with_the_store(metrics):
    report, store = metrics.report(), metrics.store
    assert (report["recipe"], report["policy"], report["calibration"]) == ("tck", "none", "made in a test")
    assert report["refined_layers"] == [1]
    assert report["levels"] == store.usage_by_level()
    assert report["allocated_bytes"] == store.allocated_bytes
    assert report["effective_bits"] == store.effective_bits
    assert report["max_total_num_tokens"] == PAGES * PAGE_TOKENS
    assert report["bytes_per_token"] == sum(store.allocated_bytes.values()) / (PAGES * PAGE_TOKENS)
    assert report["kv_budget_bytes"] == sum(store.allocated_bytes.values())
    assert report["hot_blocks"] == {"capacity": HOT_PAGES * 16, "free": store.hot.free_blocks}
    assert report["forwards"] == 2
    assert report["demotions"] == store.residency.demotions > 0
    assert report["demotions_by_level"] == {"0": report["demotions"], "2": 0, "4": 0, "8": 0}
    assert report["promotions_by_level"] == {"2": 0, "4": 0, "8": 0, "32": 0}
    assert report["promotions_by_source"] == {"recomputed": 0, "host": 0}
    assert "host_store" not in report
    assert "mass" not in report
    assert report["pages_sealed_without_hot_rows"] == store.residency.sealed_without_hot_rows > 0
    assert report["rows_with_nan_or_inf"] == 1


def test_report_counts_add_up(metrics):
    report = metrics.report()
    assert sum(entry["tokens"] for entry in report["levels"].values()) == 7 * PAGE_TOKENS
    assert report["levels"]["fresh"]["tokens"] == PAGE_TOKENS
    bits = report["effective_bits"] / 8 * GEOMETRY.kv_elements_per_token
    assert bits == pytest.approx(report["bytes_per_token"])


def test_capacity_against_bf16(metrics):
    report = metrics.report()
    assert report["capacity_ratio"] == pytest.approx(16 / report["effective_bits"])


def test_startup_lines_say_what_is_served(metrics):
    first, second = metrics.startup_lines()
    assert "recipe tck, policy none, recent window 256 tokens, calibration made in a test" in first
    assert first.endswith("refined layers: 1")
    assert f"{PAGES * PAGE_TOKENS} tokens of KV" in second
    assert f"{metrics.sizes.capacity_ratio:.2f} times the {metrics.sizes.bf16_tokens} of bf16" in second
    assert f"{metrics.store.effective_bits:.2f} effective bits" in second


def test_periodic_line_has_every_level(metrics):
    line = metrics.periodic_line()
    for level, entry in metrics.store.usage_by_level().items():
        assert f"level {level}: {entry['tokens']} tokens {entry['bytes'] / MIB:.1f} MiB" in line
    used = metrics.store.hot.capacity - metrics.store.hot.free_blocks
    assert f"hot blocks {used} of {metrics.store.hot.capacity} used" in line
    assert re.search(r"\d+ demotions, promotions: 0 recomputed, 0 from host memory, 1 rows with NaN or Inf$", line)


def test_a_policy_that_goes_by_mass_shows_it():
    store = make_store(PAGES, HOT_PAGES, policy="attention", policy_interval=8)
    pages = take_pages(store, 4)
    sizes = PoolSizes(sum(store.allocated_bytes.values()), GEOMETRY.kv_elements_per_token * 2, PAGES, store.hot.capacity)
    metrics = Metrics(OscarConfig(recipe="tck", policy="attention"), sizes, store, "made in a test")
    assert metrics.report()["mass"] == {"covered_share": None, "pages_tracked": 0, "slots": HOT_PAGES * 4}
    assert "attention mass" not in metrics.periodic_line()
    assert f", attention mass {store.mass.nbytes / MIB:.1f} MiB)" in metrics.startup_lines()[1]
    store.residency.prepare([Sequence(pages, 0, 128, False)])
    store.residency.demote(int(pages[1]), 4)
    table = store.mass.table
    table.values[:, table.slots[pages[:2]]] = 1.0
    store.mass.heat.send(store.hot.row_masks)
    store.mass.heat.receive()
    report = metrics.report()
    assert report["mass"] == {"covered_share": pytest.approx((32 + 4) / 64), "pages_tracked": 4, "slots": HOT_PAGES * 4}
    assert report["demotions_by_level"]["4"] == 1
    assert json.loads(json.dumps(report)) == report
    end = r"1 demotions, promotions: 0 recomputed, 0 from host memory, 0 rows with NaN or Inf$"
    assert re.search(r", 56\.2 % of the attention mass on hot rows, " + end, metrics.periodic_line())


def test_copies_in_host_memory_are_shown():
    store = make_store(PAGES, HOT_PAGES, host_pages=4)
    pages = take_pages(store, 3)
    sizes = PoolSizes(sum(store.allocated_bytes.values()), GEOMETRY.kv_elements_per_token * 2, PAGES, store.hot.capacity)
    metrics = Metrics(OscarConfig(recipe="tck", host_gib=1.0), sizes, store, "made in a test")
    host = store.copies.host
    assert metrics.startup_lines()[2] == f"kv-quant oscar: int8 copies of 4 of {PAGES} pages in {host.nbytes / MIB:.1f} MiB of host memory"
    store.residency.prepare([Sequence(pages, 0, 96, False)])
    store.residency.prepare([Sequence(take_pages(store, 1), 0, 5, False)])
    store.end_prefill(pages)
    for page in pages.tolist():
        store.residency.demote(page, 0)
    store.residency.prepare([Sequence(np.concatenate([pages, take_pages(store, 1)]), 96, 100, False)])
    report = metrics.report()
    held = {"bytes": host.nbytes, "pages": 4, "pages_held": 3, "pages_copied": 3, "pages_dropped_for_others": 0}
    assert report["host_store"] == held
    assert report["promotions_by_source"] == {"recomputed": 0, "host": 3}
    assert report["promotions_by_level"] == {"2": 0, "4": 0, "8": 0, "32": 3}
    assert json.loads(json.dumps(report)) == report
    assert "promotions: 0 recomputed, 3 from host memory" in metrics.periodic_line()
