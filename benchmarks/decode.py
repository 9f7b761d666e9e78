"""Decode attention on a CUDA device: ours over 2-bit records and hot rows, against FlashInfer over bf16 and fp8.

    python -m benchmarks.decode [--json OUT] [--shapes 8x32768,...]

Times are medians of CUDA graph replays over the caches of several layers, so that no layer finds its bytes in L2. Bytes are what a
kernel must read (codes, scales, int8 rows; K and V rows for the baselines); the share is of the copy bandwidth, measured first.
Ours includes the combine and the basis change of the output; writing and sealing the new row are not in it.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import copy_bandwidth, filled_store, graph_microseconds, pages_of, slot_table, write_report
from oscar_radix.attention.triton_backend import TritonAttention
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.kernels.decode import decode, list_hot_pages

GEOMETRY = Geometry(layers=4, kv_heads=8, query_heads=32, head_dim=128)
SHAPES = ((1, 131072), (8, 32768), (32, 8192), (64, 4096), (8, 1024))
HOT_ROWS = (0, 2, 4, 32)
SCALE = 0.088


@dataclass(frozen=True)
class Row:
    """One measurement: microseconds a layer, megabytes it must read, and their rate as a share of the copy bandwidth."""

    batch: int
    tokens: int
    kernel: str
    microseconds: float
    megabytes: float
    bandwidth_share: float


def ours(batch: int, tokens: int, hot_rows: int) -> tuple[float, int]:
    """Microseconds and bytes a layer with `hot_rows` int8 rows in every page."""
    pages = pages_of([tokens] * batch)
    store = filled_store(GEOMETRY, pages, hot_rows)
    sequences = (slot_table(pages), torch.arange(batch, device="cuda"), torch.full((batch,), tokens, device="cuda"))
    attention = TritonAttention(store, batch, tokens)
    hot = (attention._hot_pages, attention._hot_counts)
    list_hot_pages(sequences, store.hot.device_levels, hot)
    splits = attention.splits(batch)
    workspace = (
        torch.empty(batch, GEOMETRY.query_heads, sum(splits), GEOMETRY.head_dim, device="cuda"),
        torch.empty(batch, GEOMETRY.query_heads, sum(splits), device="cuda"),
    )
    query = torch.randn(batch, GEOMETRY.query_heads, GEOMETRY.head_dim, device="cuda")
    out = torch.empty_like(query, dtype=torch.bfloat16)

    def launch(layer: int) -> None:
        tables = (store.hot.device_block_table, store.hot.device_levels)
        codec = store.codec
        parameters = (codec.key_parameters(layer), codec.value_parameters(layer))
        decode(query, attention._layer_cache(layer), tables, *parameters, sequences, hot, workspace, splits, out, SCALE)

    microseconds = graph_microseconds([lambda layer=layer: launch(layer) for layer in range(GEOMETRY.layers)])
    record = 0 if hot_rows == PAGE_TOKENS else store.layout.bytes_per_token_head
    per_token = record + hot_rows / PAGE_TOKENS * (2 * GEOMETRY.head_dim + 4)
    return microseconds, int(batch * tokens * GEOMETRY.kv_heads * per_token)


def flashinfer(batch: int, tokens: int, dtype: torch.dtype) -> tuple[float, int]:
    """Microseconds and bytes a layer of FlashInfer's paged decode, page size 16."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    page, heads, dim = 16, GEOMETRY.kv_heads, GEOMETRY.head_dim
    count = batch * tokens // page
    caches = [torch.randn(count, 2, page, heads, dim, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(GEOMETRY.layers)]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True)
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * (tokens // page)
    order = torch.randperm(count, device="cuda").int()
    last = torch.full((batch,), page, dtype=torch.int32, device="cuda")
    wrapper.plan(starts, order, last, GEOMETRY.query_heads, heads, dim, page, q_data_type=torch.bfloat16, kv_data_type=dtype)
    query = torch.randn(batch, GEOMETRY.query_heads, dim, device="cuda", dtype=torch.bfloat16)
    microseconds = graph_microseconds([lambda cache=cache: wrapper.run(query, cache) for cache in caches])
    return microseconds, 2 * batch * tokens * heads * dim * caches[0].element_size()


def main() -> None:
    """Measure, print, and write where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", default=",".join(f"{b}x{t}" for b, t in SHAPES))
    parser.add_argument("--no-flashinfer", action="store_true", help="leave the baselines out (they compile for a minute)")
    args = parser.parse_args()
    peak = copy_bandwidth()
    name = torch.cuda.get_device_name()
    print(f"{name}, copy {peak / 1e9:.0f} GB/s, {GEOMETRY.query_heads}/{GEOMETRY.kv_heads} heads, D = {GEOMETRY.head_dim}", flush=True)
    kernels = {f"ours, {rows} hot rows a page": (lambda b, t, rows=rows: ours(b, t, rows)) for rows in HOT_ROWS}
    if not args.no_flashinfer:
        kernels["FlashInfer bf16"] = lambda b, t: flashinfer(b, t, torch.bfloat16)
        kernels["FlashInfer fp8"] = lambda b, t: flashinfer(b, t, torch.float8_e4m3fn)
    rows = []
    for shape in args.shapes.split(","):
        batch, tokens = map(int, shape.split("x"))
        for kernel, measure in kernels.items():
            microseconds, size = measure(batch, tokens)
            row = Row(batch, tokens, kernel, microseconds, size / 1e6, size / microseconds * 1e6 / peak)
            rows.append(row)
            torch.cuda.empty_cache()
            figures = f"{row.microseconds:8.1f} us {row.megabytes:8.1f} MB {100 * row.bandwidth_share:5.1f} % of copy"
            print(f"B={batch:3} L={tokens:7} {kernel:24} {figures}", flush=True)
    if args.json:
        write_report(
            args.json, f"python -m benchmarks.decode --shapes {args.shapes}", [vars(row) for row in rows], copy_bytes_per_second=peak
        )


if __name__ == "__main__":
    main()
