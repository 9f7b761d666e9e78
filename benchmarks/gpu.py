"""What the GPU benchmarks share: a filled KV store, timing in CUDA graphs, the copy bandwidth, and how a report is written."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
import triton

from oscar_radix.codec.parameters import placeholder
from oscar_radix.codec.tck import TckRecipe
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.policy import NonePolicy
from oscar_radix.pool.hot_pool import PAGE_BLOCKS
from oscar_radix.pool.store import KVStore


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, read plus written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    milliseconds = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.numel() / milliseconds * 1e3


def graph_microseconds(launches: list) -> float:
    """Median time of one launch, replayed in a CUDA graph of all of them."""
    for launch in launches:
        launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    return triton.testing.do_bench(graph.replay, warmup=10, rep=60, return_mode="median") * 1e3 / len(launches)


def pages_of(lengths: list[int]) -> list[torch.Tensor]:
    """Pages of each sequence in random order, page 0 unused: int64 [tokens / 32] each."""
    counts = [-(-length // PAGE_TOKENS) for length in lengths]
    return list((torch.randperm(sum(counts), device="cuda") + 1).split(counts))


def filled_store(geometry: Geometry, pages: list[torch.Tensor], hot_rows: int, refined: bool = False) -> KVStore:
    """Random records in every page, and `hot_rows` random int8 rows in each; no layer is refined, or all are."""
    count = sum(len(each) for each in pages)
    blocks = max(PAGE_BLOCKS, count * hot_rows // 2)
    recipe = TckRecipe(refined_share=float(refined))
    low = recipe.refined_layers(geometry.layers)
    store = KVStore(geometry, recipe.layout(geometry.head_dim), count, blocks, NonePolicy(), 256, "cuda", refined=low)
    store.codec = placeholder(recipe, geometry, "cuda")
    for buffer in (store.base.k_codes, store.base.v_codes, store.base.k_low, store.base.v_low):
        buffer.random_(0, 256)
    for buffer in (store.hot.k_rows, store.hot.v_rows):
        buffer.random_(-127, 128)
    for buffer in (store.base.scales, store.hot.scales):
        buffer.uniform_(0.01, 0.1)
    store.hot.device_levels.fill_(hot_rows)
    if hot_rows:
        table = torch.randperm(blocks, device="cuda")[: count * hot_rows // 2].view(count, -1)
        store.hot.device_block_table[1:, : hot_rows // 2] = table.int()
        store.hot.row_masks.fill_(-1 if hot_rows == PAGE_TOKENS else (1 << hot_rows) - 1)
    return store


def slot_table(pages: list[torch.Tensor]) -> torch.Tensor:
    """req_to_token of these sequences: int32 [B, longest]."""
    longest = max(len(each) for each in pages) * PAGE_TOKENS
    table = torch.zeros(len(pages), longest, dtype=torch.int32, device="cuda")
    for row, each in zip(table, pages, strict=True):
        row[: len(each) * PAGE_TOKENS] = (each[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device="cuda")).flatten()
    return table


def write_report(path: Path, command: str, rows: list[dict[str, Any]], **extra: Any) -> None:
    """JSON with the device, versions and the command that repeats it."""
    versions = {}
    for name in ("torch", "triton", "flashinfer-python", "sglang"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    report = {"command": command, "device": torch.cuda.get_device_name(), "versions": versions, **extra, "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n")
