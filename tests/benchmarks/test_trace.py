"""Grouping of GPU time on small traces made by hand."""

import gzip
import json
import re
from pathlib import Path

import pytest

from benchmarks import trace

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
ROUND_OF_21 = [("_stage1", 10.0), ("_combine", 2.0), *[("nvjet_tst_128x64", 4.0)] * 18, ("_write_rows", 3.0)]
"""Kernels of one graph launch in order, 87 microseconds."""


def event(name, start, duration, category="kernel", **args):
    return {"ph": "X", "name": name, "cat": category, "ts": start, "dur": duration, "args": args}


def graph_launch(start, correlation):
    """One launch, kernels without gaps."""
    events = []
    for name, duration in ROUND_OF_21:
        events.append(event(name, start, duration, correlation=correlation))
        start += duration
    return events


@pytest.fixture
def five_steps():
    """Five steps of 100 us, the first of 500: 87 us of graph, then 3 us of sampling that a copy of 2 us overlaps, then nothing."""
    events = [event("aten::mm", 0, 5000, "cpu_op"), {"ph": "M", "name": "process_name"}]
    for step, start in enumerate((0, 500, 600, 700, 800)):
        events += graph_launch(start, 7 + step)
        events.append(event("at::native::reduce_kernel<ArgMaxOps>", start + 88, 3.0, correlation=1000 + step))
        events.append(event("Memcpy DtoH (Device -> Pinned)", start + 89, 2.0, "gpu_memcpy", correlation=2000 + step))
    return events[::-1]


def test_a_step_is_from_graph_launch_to_graph_launch_without_the_first(five_steps):
    result = trace.breakdown(five_steps, steps=99)
    assert (result.steps, result.graphs) == (3, True)
    assert result.step_us == pytest.approx(100)
    assert result.kernels == pytest.approx(23)
    assert result.idle_us == pytest.approx(10)
    assert result.overlapped_us == pytest.approx(2)
    expected = {
        "matrix products": [72, 18], "ours: stage 1": [10, 1], "ours: write": [3, 1], "sampling": [3, 1],
        "ours: combine": [2, 1], "memory copies": [2, 1],
    }  # fmt: skip
    assert result.groups == {group: pytest.approx(values) for group, values in expected.items()}
    assert next(iter(result.groups)) == "matrix products"
    assert sum(us for us, _ in result.groups.values()) == pytest.approx(result.step_us - result.idle_us + result.overlapped_us)
    assert result.largest[0] == ("nvjet_tst_128x64", "matrix products", pytest.approx(72), pytest.approx(18))


def test_without_graphs_the_asked_steps_divide_the_trace():
    events = [event("_combine", start, 10.0, correlation=start) for start in (0, 40, 90)]
    result = trace.breakdown(events, steps=2)
    assert (result.steps, result.graphs, result.step_us, result.idle_us) == (2, False, 50, 35)


def test_a_trace_without_gpu_events_has_no_breakdown():
    assert trace.breakdown([event("aten::mm", 0, 5, "cpu_op")], steps=1) is None


def test_the_table_shows_every_group_and_the_idle_time_without_the_profiler(five_steps):
    text = trace.table(trace.breakdown(five_steps, steps=1), measured_ms=0.094)
    assert re.search(r"matrix products +72\.0 +18\.0 +72\.0%", text)
    assert re.search(r"idle, no kernel runs +10\.0 +10\.0%", text)
    assert "without the profiler 94 us a step, so 4 us of it idle" in text


def test_events_are_read_from_a_gzipped_trace(tmp_path):
    path = tmp_path / "a.trace.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": [{"ph": "M"}]}).encode()))
    assert trace.read_events(path) == [{"ph": "M"}]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("void flashinfer::BatchPrefillWithPagedKVCacheKernel<flashinfer::KernelTraits<(flashinfer::MaskMode)0>>", "FlashInfer attention"),
        ("void flashinfer::BatchDecodeWithPagedKVCacheKernel<(flashinfer::PosEncodingMode)0, 2u, 4u>", "FlashInfer attention"),
        ("void flashinfer::PersistentVariableLengthMergeStatesKernel<8u, 16u, 8u, 4u>", "FlashInfer attention"),
        ("void flashinfer::norm::FusedAddRMSNormKernel<8u, __nv_bfloat16>", "norms, rope, activation"),
        ("void flashinfer::activation::act_and_mul_kernel<__nv_bfloat16, &silu>", "norms, rope, activation"),
        ("void flashinfer::sampling::TopKTopPSamplingFromProbKernel<1024u>", "sampling"),
        ("_fwd_grouped_kernel_stage1", "other attention"),
        ("nvjet_tst_64x8_64x16_4x1_v_bz_TNN", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<int>>", "elementwise and indexing"),
        ("some_new_kernel", "other"),
    ],
)
def test_groups_of_kernels_that_are_not_ours(name, group):
    assert trace.group_of(name) == group


def test_every_kernel_that_we_launch_has_a_group_of_ours():
    source = "\n".join(path.read_text() for path in KERNELS.glob("*.py"))
    jitted = set(re.findall(r"@(?:triton|gluon)\.jit[^\n]*\ndef (\w+)\(", source))
    launched = jitted & set(re.findall(r"^ +(?:\w+ = )?(\w+)\[.*\]\(", source, re.MULTILINE))
    assert {"_stage1", "_combine", "_seal", "extend_hopper"} <= launched
    assert not [name for name in launched if not trace.group_of(name).startswith("ours: ")]
