"""Where a decode step's time goes, from a chrome trace of torch's profiler.

A step is the time from the start of one CUDA graph launch to the start of the next: all kernels of a launch carry one correlation id. The
first step of a trace pays for the profiler's own start and is left out. Without graphs the whole trace is divided by the steps asked for.
Idle is the time in which no kernel, copy or memset runs on any stream. A kernel that is launched early and waits for the one before it
counts from its launch, so its group looks longer than its work; the overlap has a line of its own.
"""

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GPU_CATEGORIES = {"kernel": None, "gpu_memcpy": "memory copies", "gpu_memset": "memory copies"}
SMALLEST_GRAPH = 20
"""Kernels with one correlation id from which on it is a graph launch; other launches have one."""

OURS = {
    "ours: stage 1": ("_stage1",),
    "ours: combine": ("_combine",),
    "ours: write": ("_write_rows", "_write_prefill"),
    "ours: seal": ("_seal",),
    "ours: plan": ("_list_pages", "_assign_parts"),
    "ours: levels and mass": ("_keep_rows", "mass_records", "_add_mass", "_keep_queries", "_sum_and_decay"),
    "ours: extend": ("_extend", "extend_hopper", "extend_dense_round", "_open_prefix", "_merge_parts", "_leave_basis"),
}
"""Names of our kernels by group; a trace calls a Triton kernel by its function's name."""

PATTERNS = (
    ("FlashInfer attention", r"BatchDecode|BatchPrefill|SinglePrefill|MergeState|flashinfer.*attention"),
    ("other attention", r"flash::|flash_?attn|fmha|_fwd_(grouped_)?kernel|attention"),
    ("matrix products", r"gemm|gemv|cublas|cutlass|nvjet|splitk|xmma|matmul"),
    ("sampling", r"sampl|arg_?max|softmax|multinomial|top_?[kp]|sort|exponential"),
    ("norms, rope, activation", r"norm|rope|rotary|act_and_mul|silu|activation"),
    ("bf16 rows into the cache", r"store_?kv|store_?cache|set_kv"),
    ("elementwise and indexing", r"elementwise|copy|index|gather|scatter|embedding|fill|reduce|arange|scan|catarray|future|triton_"),
)
"""Groups of everything else; the first that is found in the name, without regard to case."""

OTHER = "other"
LARGEST, PRINTED = 40, 16
"""Single kernels kept in a breakdown, and shown in a table."""


@dataclass(frozen=True)
class Breakdown:
    """Per step: microseconds from start to start, idle and overlapped microseconds, kernels, and where they went, the largest first.

    `groups` has [microseconds, kernels]; their sum is `step_us - idle_us + overlapped_us`. `largest` has (name, group, microseconds,
    launches) of single kernels.
    """

    steps: int
    graphs: bool
    step_us: float
    idle_us: float
    overlapped_us: float
    kernels: float
    groups: dict[str, list[float]]
    largest: list[tuple[str, str, float, float]]


def read_events(path: Path) -> list[dict[str, Any]]:
    """Events of a gzipped trace."""
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def group_of(name: str, category: str = "kernel") -> str:
    """The group of a kernel, copy or memset."""
    fixed = GPU_CATEGORIES[category]
    if fixed:
        return fixed
    for group, names in OURS.items():
        if name in names:
            return group
    for group, pattern in PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return group
    return OTHER


def breakdown(events: Iterable[dict[str, Any]], steps: int) -> Breakdown | None:
    """None when the trace has no GPU events, or fewer than two steps' worth of them.

    Args:
        events: `traceEvents` of a chrome trace, times in microseconds.
        steps: how many steps the trace is of, where that cannot be seen from graph launches.
    """
    work = sorted((e for e in events if e.get("ph") == "X" and e.get("cat") in GPU_CATEGORIES), key=lambda e: e["ts"])
    if not work:
        return None
    launches = _graph_launches(work)
    if len(launches) > 3:
        launches = launches[1:]
    graphs = len(launches) >= 2
    if graphs:
        first, last, steps = launches[0], launches[-1], len(launches) - 1
        work = [event for event in work if first <= event["ts"] < last]
    else:
        first, last = work[0]["ts"], max(event["ts"] + event["dur"] for event in work)
    groups: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    kernels: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in work:
        group = group_of(event["name"], event["cat"])
        for entry in (groups[group], kernels[event["name"], group]):
            entry[0] += event["dur"] / steps
            entry[1] += 1 / steps
    busy = _busy(work, last)
    total = sum(event["dur"] for event in work)
    idle, overlapped = (last - first - busy) / steps, (total - busy) / steps
    by_group = dict(sorted(groups.items(), key=lambda item: -item[1][0]))
    largest = sorted(((*key, us, count) for key, (us, count) in kernels.items()), key=lambda entry: -entry[2])[:LARGEST]
    return Breakdown(steps, graphs, (last - first) / steps, idle, overlapped, len(work) / steps, by_group, largest)


def table(result: Breakdown, measured_ms: float | None = None) -> str:
    """Microseconds a step, kernels a step and share of the step by group; then the largest kernels.

    Args:
        result: of `breakdown`.
        measured_ms: the same step without the profiler, for the last line.
    """
    lines = [f"{'group':30} {'us a step':>10} {'kernels':>8} {'share':>7}"]
    line = lambda name, us, count: f"{name:30} {us:10.1f} {count:>8} {us / result.step_us:7.1%}"  # noqa: E731
    lines += [line(name, us, f"{count:.1f}") for name, (us, count) in result.groups.items()]
    lines.append(line("idle, no kernel runs", result.idle_us, ""))
    if result.overlapped_us >= 0.05:
        lines.append(line("less: two kernels at once", -result.overlapped_us, ""))
    lines.append(line("step under the profiler", result.step_us, f"{result.kernels:.1f}"))
    if measured_ms is not None:
        busy = result.step_us - result.idle_us
        lines.append(f"without the profiler {measured_ms * 1e3:.0f} us a step, so {measured_ms * 1e3 - busy:.0f} us of it idle")
    lines.append(f"({result.steps} steps, {'from graph launch to graph launch' if result.graphs else 'no graphs: steps as asked for'})")
    lines.append("largest kernels (us a step, launches a step, group):")
    for name, group, us, count in result.largest[:PRINTED]:
        lines.append(f"  {us:9.1f} {count:6.1f}  {group:28} {name[:90]}")
    return "\n".join(lines)


def _graph_launches(work: Sequence[dict[str, Any]]) -> list[float]:
    """When each graph launch's first kernel starts, in order."""
    starts: dict[Any, list[float]] = defaultdict(list)
    for event in work:
        correlation = event.get("args", {}).get("correlation")
        if event["cat"] == "kernel" and correlation is not None:
            starts[correlation].append(event["ts"])
    return sorted(times[0] for times in starts.values() if len(times) >= SMALLEST_GRAPH)


def _busy(work: Sequence[dict[str, Any]], last: float) -> float:
    """Length of the union of all events, which are in order of their start, up to `last`."""
    busy, reached = 0.0, float("-inf")
    for event in work:
        end = min(event["ts"] + event["dur"], last)
        busy += max(0.0, end - max(event["ts"], reached))
        reached = max(reached, end)
    return busy
