"""Extend attention on a CUDA device: new tokens on a long cached prefix, ours over 2-bit pages against FlashInfer over bf16.

    python -m benchmarks.extend [--json OUT] [--cases 256x16384,...]

Milliseconds a layer, median, of everything that attention does with q, k and v: for ours basis changes, int8 rows, sealing, opening the
prefix, attention and the change back; for FlashInfer the append to its pages and the attention. GPU time is that of a CUDA graph's replay;
host time is what Python takes to launch the same, which runs ahead of the GPU in a server, and bounds small batches. Peak memory is what
a batch and a call allocate on top of the caches. FLOP are those of the attention itself, 4 * D a query head, query and key.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import triton

from benchmarks.gpu import filled_store, pages_of, slot_table, write_report
from oscar_radix.attention.plan import WritePlan
from oscar_radix.attention.triton_backend import TritonAttention
from oscar_radix.geometry import PAGE_TOKENS, Geometry

GEOMETRY = Geometry(layers=1, kv_heads=8, query_heads=32, head_dim=128)
CASES = ((256, 16384), (2048, 16384), (256, 102400), (2048, 102400), (8192, 0), (8192, 24576))
HOT_ROWS = (0, 2, 32)
SCALE = 0.088


@dataclass(frozen=True)
class Cost:
    """Median milliseconds of a call on the GPU and on the host, and the MiB that it allocates."""

    milliseconds: float
    host_milliseconds: float
    peak_mib: float


def measure(prepare: Callable[[], Callable[[], object]]) -> Cost:
    """Cost of the call that `prepare` makes; what `prepare` allocates counts as memory."""
    prepare()()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call = prepare()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    host = []
    for _ in range(15):
        begun = time.perf_counter()
        call()
        host.append((time.perf_counter() - begun) * 1e3)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    gpu = triton.testing.do_bench(graph.replay, warmup=10, rep=80, return_mode="median")
    return Cost(gpu, statistics.median(host), peak)


def new_rows(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of the new tokens in bf16."""
    heads = (GEOMETRY.query_heads, GEOMETRY.kv_heads, GEOMETRY.kv_heads)
    q, k, v = (torch.randn(tokens, count, GEOMETRY.head_dim, device="cuda", dtype=torch.bfloat16) for count in heads)
    return q, k, v


def ours(tokens: int, prefix: int, hot_rows: int, folded: bool) -> Cost:
    """`TritonAttention.extend` of one sequence; pages of the prefix hold `hot_rows` int8 rows."""
    (pages,) = pages_of([prefix + tokens])
    store = filled_store(GEOMETRY, [pages], hot_rows)
    store.codec.values_folded = folded
    attention = TritonAttention(store, 1, prefix + tokens)
    table = slot_table([pages])
    to = lambda values: torch.tensor(values, dtype=torch.int64, device="cuda")  # noqa: E731
    none = to([])
    completed = pages[prefix // PAGE_TOKENS :]
    starts = torch.arange(len(completed), device="cuda")[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device="cuda")
    write = WritePlan(none, none, none, none, none.view(0, 16), completed, starts)
    where = (table, to([0]), to([prefix]), to([0]), to([tokens]))
    plan = attention.plan_extend([prefix], [tokens])
    plan = plan.on([each.cuda() for each in plan.tensors()])
    slots = table[0, prefix : prefix + tokens].long()
    q, k, v = new_rows(tokens)

    def prepare() -> Callable[[], object]:
        batch = attention.extend_batch(write, slots, where, plan)
        return lambda: attention.extend(0, q, k, v, batch, SCALE)

    return measure(prepare)


def flashinfer(tokens: int, prefix: int, page: int, backend: str) -> Cost:
    """FlashInfer's paged prefill, its append included."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper, append_paged_kv_cache, get_batch_indices_positions, get_seq_lens

    length, heads, dim = prefix + tokens, GEOMETRY.kv_heads, GEOMETRY.head_dim
    count = -(-length // page)
    cache = torch.randn(count, 2, page, heads, dim, device="cuda", dtype=torch.bfloat16)
    int32 = lambda values: torch.tensor(values, dtype=torch.int32, device="cuda")  # noqa: E731
    query_starts, page_starts, last = int32([0, tokens]), int32([0, count]), int32([length - (count - 1) * page])
    order = torch.from_numpy(np.random.default_rng(0).permutation(count)).int().cuda()
    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda"), "NHD", backend=backend)
    wrapper.plan(
        query_starts, page_starts, order, last, GEOMETRY.query_heads, heads, dim, page, causal=True, q_data_type=torch.bfloat16,
        kv_data_type=torch.bfloat16,
    )  # fmt: skip
    indices, positions = get_batch_indices_positions(query_starts, get_seq_lens(page_starts, last, page), tokens)
    q, k, v = new_rows(tokens)

    def call() -> None:
        append_paged_kv_cache(k, v, indices, positions, cache, order, page_starts, last, kv_layout="NHD")
        wrapper.run(q, cache)

    return measure(lambda: call)


def main() -> None:
    """Measure, print, and write where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cases", default=",".join(f"{new}x{prefix}" for new, prefix in CASES), help="new tokens x cached prefix")
    parser.add_argument("--no-flashinfer", action="store_true", help="leave the baselines out (they compile for minutes)")
    args = parser.parse_args()
    kernels = {f"ours, {rows} hot rows a page": (lambda n, p, rows=rows: ours(n, p, rows, False)) for rows in HOT_ROWS}
    kernels["ours, values folded"] = lambda n, p: ours(n, p, 0, True)
    if not args.no_flashinfer:
        kernels["FlashInfer bf16, page 16"] = lambda n, p: flashinfer(n, p, 16, "auto")
        kernels["FlashInfer bf16, page 1"] = lambda n, p: flashinfer(n, p, 1, "auto")
    print(f"{torch.cuda.get_device_name()}, {GEOMETRY.query_heads}/{GEOMETRY.kv_heads} heads, D = {GEOMETRY.head_dim}", flush=True)
    rows = []
    for case in args.cases.split(","):
        new, prefix = map(int, case.split("x"))
        flop = 4 * GEOMETRY.head_dim * GEOMETRY.query_heads * (new * prefix + new * (new + 1) // 2)
        for kernel, call in kernels.items():
            cost = call(new, prefix)
            torch.cuda.empty_cache()
            rows.append({"new": new, "prefix": prefix, "kernel": kernel, **asdict(cost)})
            figures = f"{cost.milliseconds:8.3f} ms {flop / cost.milliseconds / 1e9:6.0f} TFLOP/s, host {cost.host_milliseconds:.3f} ms"
            print(f"{new:5} on {prefix:7} {kernel:26} {figures}, {cost.peak_mib:7.1f} MiB", flush=True)
            if args.json:
                write_report(args.json, f"python -m benchmarks.extend --cases {args.cases}", rows)


if __name__ == "__main__":
    main()
