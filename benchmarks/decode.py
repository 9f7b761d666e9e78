"""Decode attention on a CUDA device: ours over 2-bit records and hot rows, against FlashInfer and SGLang's Triton kernel.

    python -m benchmarks.decode [--json OUT] [--shapes 8x32768,ragged,...] [--heads 32/8x128,...]

Times are medians of CUDA graph replays over the caches of several layers, so that no layer finds its bytes in L2. Bytes are what a
kernel must read (codes, scales, int8 rows; K and V rows for the baselines); the share is of the copy bandwidth, measured first.
`ours, N hot rows` is stage 1 and the combine, values folded into the projections as a server of these models has them; `whole layer`
adds the basis changes, the new row and sealing, which for the baselines (whose new row is not written here) is more than they do. Of a
model's layers, a sixteenth is refined.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.gpu import copy_bandwidth, filled_store, graph_microseconds, pages_of, slot_table, write_report
from oscar_radix.attention.layer_views import LayerViews
from oscar_radix.attention.triton_backend import DecodeBatch, TritonAttention
from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.kernels.decode import decode

LAYERS = 4
RAGGED = [65537, 40000, 32768, 32001, 24576, 16384, 16000, 8192, 8191, 6000, 4096, 4000, 2048, 1024, 700, 33]
SHAPES = "1x131072,8x32768,32x8192,64x4096,ragged,8x1024"
HEADS = "32/8x128,28/4x128,9/3x64"
HOT_ROWS = (0, 2, 4, 32)
SCALE = 0.088


@dataclass(frozen=True)
class Row:
    """One measurement: microseconds a layer, megabytes it must read, and their rate as a share of the copy bandwidth."""

    heads: str
    shape: str
    kernel: str
    microseconds: float
    megabytes: float
    bandwidth_share: float


def ours(geometry: Geometry, lengths: list[int], hot_rows: int, whole: bool = False, refined: bool = False) -> tuple[float, int]:
    """Microseconds and bytes a layer with `hot_rows` int8 rows in every page."""
    pages = pages_of(lengths)
    store = filled_store(geometry, pages, hot_rows, refined)
    store.codec.values_folded = True
    batch, dim = len(lengths), geometry.head_dim
    attention = TritonAttention(store, batch, max(lengths))
    table = slot_table(pages)
    last = torch.tensor([length - 1 for length in lengths], device="cuda")
    rows = torch.arange(batch, device="cuda")
    step = DecodeBatch(table, rows, last + 1, table[rows, last].long())
    attention.prepare_decode(step)
    q = torch.randn(batch, geometry.query_heads, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, geometry.kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    slots = attention.parts(batch) + batch
    workspace = tuple(torch.empty(geometry.query_heads, slots, *end, device="cuda") for end in ((dim,), ()))
    query, out = q.float(), torch.empty_like(q)
    views = [LayerViews.of(store, store.codec, layer) for layer in range(LAYERS)]
    plan, blocks = attention.decode_plan(batch), store.hot.device_block_table

    def launch(layer: int) -> None:
        if whole:
            attention.decode(layer, q, k, v, step, SCALE)
            return
        of = views[layer]
        decode(query, of.cache, blocks, of.keys, of.values, step.lengths, plan, workspace, out, SCALE, False, low=of.low)

    launches = [lambda layer=layer: launch(layer) for layer in range(LAYERS)]
    microseconds = graph_microseconds(launches)
    record = 0 if hot_rows == PAGE_TOKENS else store.layout.bytes_per_token_head + refined * store.layout.code_bytes
    per_token = record + hot_rows / PAGE_TOKENS * (2 * dim + 4)
    return microseconds, int(sum(lengths) * geometry.kv_heads * per_token)


def flashinfer(geometry: Geometry, lengths: list[int], dtype: torch.dtype) -> tuple[float, int]:
    """Microseconds and bytes a layer of FlashInfer's paged decode, page size 16."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    page, heads, dim = 16, geometry.kv_heads, geometry.head_dim
    counts = [-(-length // page) for length in lengths]
    int32 = lambda values: torch.tensor(values, dtype=torch.int32, device="cuda")  # noqa: E731
    total = sum(counts)
    caches = [torch.randn(total, 2, page, heads, dim, device="cuda", dtype=torch.bfloat16).to(dtype) for _ in range(LAYERS)]
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=True)
    starts = int32([0, *torch.tensor(counts).cumsum(0).tolist()])
    order = torch.randperm(total, device="cuda").int()
    last = int32([length - (count - 1) * page for length, count in zip(lengths, counts, strict=True)])
    wrapper.plan(starts, order, last, geometry.query_heads, heads, dim, page, q_data_type=torch.bfloat16, kv_data_type=dtype)
    query = torch.randn(len(lengths), geometry.query_heads, dim, device="cuda", dtype=torch.bfloat16)
    microseconds = graph_microseconds([lambda cache=cache: wrapper.run(query, cache) for cache in caches])
    return microseconds, 2 * sum(lengths) * heads * dim * caches[0].element_size()


def sglang_triton(geometry: Geometry, lengths: list[int]) -> tuple[float, int]:
    """Microseconds and bytes a layer of SGLang's Triton decode kernel in bf16, scattered slots, the best of its numbers of splits."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    total, dim, batch = sum(lengths), geometry.head_dim, len(lengths)
    rows = [[torch.randn(total, geometry.kv_heads, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)] for _ in range(LAYERS)]
    query = torch.randn(batch, geometry.query_heads, dim, device="cuda", dtype=torch.bfloat16)
    out, slots = torch.empty_like(query), torch.randperm(total, device="cuda")
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    times = []
    for splits in (4, 8, 16, 32):
        partial = torch.empty(batch, geometry.query_heads, splits, dim, device="cuda")
        lse = torch.empty(batch, geometry.query_heads, splits, device="cuda")
        count = torch.full((batch,), splits, dtype=torch.int32, device="cuda")
        arguments = (out, starts, slots, partial, lse, count, splits, SCALE, 1.0, 1.0)
        times.append(graph_microseconds([lambda k=k, v=v, a=arguments: decode_attention_fwd(query, k, v, *a) for k, v in rows]))
    return min(times), 2 * total * geometry.kv_heads * dim * 2


def kernels(baselines: bool) -> dict[str, Callable[[Geometry, list[int]], tuple[float, int]]]:
    """What is measured, by name."""
    found = {f"ours, {rows} hot rows": (lambda g, n, rows=rows: ours(g, n, rows)) for rows in HOT_ROWS}
    for rows in (0, 2):
        found[f"ours, {rows} hot rows, refined layer"] = lambda g, n, rows=rows: ours(g, n, rows, refined=True)
    found["ours, 0 hot rows, whole layer"] = lambda g, n: ours(g, n, 0, whole=True)
    if baselines:
        found["FlashInfer bf16"] = lambda g, n: flashinfer(g, n, torch.bfloat16)
        found["FlashInfer fp8"] = lambda g, n: flashinfer(g, n, torch.float8_e4m3fn)
        found["SGLang Triton bf16"] = sglang_triton
    return found


def main() -> None:
    """Measure, print, and write where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", default=SHAPES, help="requests x tokens, or 'ragged': 16 requests of 33 to 65537 tokens")
    parser.add_argument("--heads", default=HEADS, help="query heads / KV heads x head dim")
    parser.add_argument("--no-baselines", action="store_true", help="ours alone (FlashInfer compiles for a minute)")
    args = parser.parse_args()
    peak = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {peak / 1e9:.0f} GB/s", flush=True)
    rows = []
    for heads in args.heads.split(","):
        counts, dim = heads.split("x")
        query_heads, kv_heads = map(int, counts.split("/"))
        geometry = Geometry(LAYERS, kv_heads, query_heads, int(dim))
        for shape in args.shapes.split(","):
            batch, _, tokens = shape.partition("x")
            lengths = RAGGED if shape == "ragged" else [int(tokens)] * int(batch)
            for kernel, measure in kernels(not args.no_baselines).items():
                microseconds, size = measure(geometry, lengths)
                rows.append(Row(heads, shape, kernel, microseconds, size / 1e6, size / microseconds * 1e6 / peak))
                torch.cuda.empty_cache()
                figures = f"{microseconds:8.1f} us {size / 1e6:7.1f} MB {100 * rows[-1].bandwidth_share:5.1f} % of copy"
                print(f"{heads:10} {shape:9} {kernel:34} {figures}", flush=True)
                if args.json:
                    command = f"python -m benchmarks.decode --shapes {args.shapes} --heads {args.heads}"
                    write_report(args.json, command, [asdict(row) for row in rows], copy_bytes_per_second=peak)


if __name__ == "__main__":
    main()
