"""Every Triton kernel compiles for sm_90 and sm_80, without a GPU, and stays within the registers that its occupancy needs."""

import subprocess
from functools import lru_cache

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from oscar_radix.kernels import (
    decode,
    decode_plan,
    extend,
    extend_dense,
    extend_hopper,
    extend_parts,
    leave_basis,
    open_rows,
    seal,
    write,
    write_prefill,
)

POINTERS = {
    **dict.fromkeys(("k_codes", "v_codes", "k_low", "v_low", "key_masks", "masks_ptr", "levels_ptr", "k_ptr", "v_ptr", "s_ptr"), "*u8"),
    **dict.fromkeys(("hot_k", "hot_v", "k8", "v8", "k8_ptr", "v8_ptr"), "*i8"),
    **dict.fromkeys(("scales", "hot_scales", "row_scales", "scales_ptr"), "*fp16"),
    **dict.fromkeys(("energy_weights", "energy_unit", "value_unit"), "*fp64"),
    **dict.fromkeys(("req_rows", "seq_lens", "prefix_lens", "starts_ptr", "lengths_ptr", "slots_ptr", "pages_ptr"), "*i64"),
    **dict.fromkeys(("row_masks", "table_ptr", "hot_mask_ptr", "req_to_token", "plan_pages", "list_ptr", "count_ptr", "bad_ptr"), "*i32"),
    **dict.fromkeys(("part_starts", "part_requests", "requests_ptr", "tiles_ptr"), "*i32"),
    **dict.fromkeys(("block_request", "block_first"), "*i32"),
    **dict.fromkeys(
        ("query_ptr", "key_ptr", "value_ptr", "key_step", "key_zero", "partial_ptr", "rotation_ptr", "mean_ptr", "final_lse_ptr"), "*fp32"
    ),
    **dict.fromkeys(("lse_ptr", "key_mean", "key_basis", "query_basis", "value_mean", "value_rotation", "query_out"), "*fp32"),
    **dict.fromkeys(("inverse_step", "top_ptr"), "*fp32"),
}
WRITE_INPUTS = {"q_ptr": "*bf16", "k_ptr": "*bf16", "v_ptr": "*bf16", "k_half": "*fp16", "v_half": "*fp16", "query_scale": "fp32"}
PREFILL_INPUTS = {**WRITE_INPUTS, "query_out": "*fp16"}
EXTEND_INPUTS = {
    **dict.fromkeys(("query_ptr", "k_ptr", "v_ptr"), "*fp16"),
    **dict.fromkeys(("k_codes", "v_codes", "k_low", "v_low", "hot_k", "hot_v"), "*i32"),
}
OPEN_INPUTS = {**EXTEND_INPUTS, **dict.fromkeys(("k_out", "v_out"), "*i32")}
DENSE_INPUTS = {"query_ptr": "*fp16", "out_ptr": "*bf16", "segments_ptr": "*i32", **dict.fromkeys(("acc_ptr", "state_ptr"), "*fp32")}
SWIZZLED = repr(gl.NVMMASharedLayout(128, 16, 2))
STAGE1_INPUTS = {"scales": "*u8"}
ONE_WARP = {"num_warps": 1, "maxnreg": 128}
COMBINE = {"G": 4, "Hq": 32, "D": 128, "S": 256, "CHUNK": 64}
GQA = {"Hkv": 8, "G": 4, "D": 128}
SMALL = {"Hkv": 3, "G": 3, "D": 64}
PLAIN, FINE = {"REFINED": False}, {"REFINED": True}

CASES = {
    "decode": (decode._stage1, {"PASSES": 1, "OVERLAP": True, **GQA, **PLAIN}, ONE_WARP, STAGE1_INPUTS),
    "decode, 16 heads a group": (decode._stage1, {"PASSES": 2, "OVERLAP": False, **GQA, **PLAIN, "G": 16}, ONE_WARP, STAGE1_INPUTS),
    "decode, D 64": (decode._stage1, {"PASSES": 1, "OVERLAP": False, **SMALL, **PLAIN}, ONE_WARP, STAGE1_INPUTS),
    "decode, refined": (decode._stage1, {"PASSES": 1, "OVERLAP": True, **GQA, **FINE}, ONE_WARP, STAGE1_INPUTS),
    "decode, refined, D 64": (decode._stage1, {"PASSES": 1, "OVERLAP": False, **SMALL, **FINE}, ONE_WARP, STAGE1_INPUTS),
    "combine": (
        decode._combine,
        {**COMBINE, "C": 128, "ROTATE": True, "KEEP_LSE": False, "OVERLAP": True},
        {"num_warps": 4},
        {"out_ptr": "*bf16"},
    ),
    "combine, folded": (decode._combine, {**COMBINE, "C": 32, "ROTATE": False, "KEEP_LSE": True, "OVERLAP": True}, {"num_warps": 4}, {}),
    "list": (decode_plan._list_pages, {"CHUNK": 1024}, {"num_warps": 4}, {}),
    "assign": (decode_plan._assign_parts, {"B": 64, "CHUNK": 64}, {"num_warps": 8}, {"starts_ptr": "*i32"}),
    "extend": (
        extend._extend,
        {"M": 128, "GROUP": 4, "PARTIAL": False, "KEEP_LSE": True, **GQA, **PLAIN},
        {"num_warps": 8, "num_stages": 1},
        EXTEND_INPUTS,
    ),
    "extend, parts": (
        extend._extend,
        {"M": 128, "GROUP": 4, "PARTIAL": True, "KEEP_LSE": False, **SMALL, **PLAIN},
        {"num_warps": 8, "num_stages": 1},
        EXTEND_INPUTS,
    ),
    "extend, refined": (
        extend._extend,
        {"M": 128, "GROUP": 4, "PARTIAL": False, "KEEP_LSE": True, **GQA, **FINE},
        {"num_warps": 8, "num_stages": 1},
        EXTEND_INPUTS,
    ),
    "open": (open_rows._open_prefix, {"TILES": 2, "Hkv": 8, "D": 128, **PLAIN}, {"num_warps": 4}, OPEN_INPUTS),
    "open, refined": (open_rows._open_prefix, {"TILES": 2, "Hkv": 8, "D": 128, **FINE}, {"num_warps": 4}, OPEN_INPUTS),
    "merge parts": (
        extend_parts._merge_parts,
        {"Hq": 32, "G": 4, "D": 128, "S": 4, "KEEP_LSE": True},
        {"num_warps": 1},
        {"out_ptr": "*bf16"},
    ),
    "extend, hopper": (
        extend_hopper.extend_hopper,
        {"GROUP": 4, "PARTIAL": False, "KEEP_LSE": True, **GQA, **PLAIN},
        {"num_warps": 4},
        EXTEND_INPUTS,
    ),
    "extend, hopper, refined": (
        extend_hopper.extend_hopper,
        {"GROUP": 4, "PARTIAL": False, "KEEP_LSE": True, **GQA, **FINE},
        {"num_warps": 4},
        EXTEND_INPUTS,
    ),
    "extend, hopper, parts": (
        extend_hopper.extend_hopper,
        {"GROUP": 4, "PARTIAL": True, "KEEP_LSE": False, **SMALL, **PLAIN},
        {"num_warps": 4},
        EXTEND_INPUTS,
    ),
    "extend, dense": (
        extend_dense.extend_dense_round,
        {"GROUP": 4, "PARTIAL": False, "KEEP_LSE": True, **GQA},
        {"num_warps": 4},
        {**DENSE_INPUTS, **dict.fromkeys(("k_rows", "v_rows"), f"tensordesc<fp16[128, 128],{SWIZZLED}>")},
    ),
    "extend, dense, D 64": (
        extend_dense.extend_dense_round,
        {"GROUP": 4, "PARTIAL": True, "KEEP_LSE": False, **SMALL},
        {"num_warps": 4},
        {**DENSE_INPUTS, **dict.fromkeys(("k_rows", "v_rows"), f"tensordesc<fp16[128, 64],{SWIZZLED}>")},
    ),
    "write, decode": (
        write._write_rows,
        {"ROTATE": True, "N": 32, "M": 16, **GQA},
        {"num_warps": 8, "num_stages": 5},
        WRITE_INPUTS,
    ),
    "write, decode, folded": (
        write._write_rows,
        {"ROTATE": False, "N": 32, "M": 16, **GQA},
        {"num_warps": 8, "num_stages": 5},
        WRITE_INPUTS,
    ),
    "write, prefill": (
        write_prefill._write_prefill,
        {"ROTATE": True, "X_TERMS": 1, "M": 64, **GQA},
        {"num_warps": 4, "num_stages": 1},
        PREFILL_INPUTS,
    ),
    "write, prefill, folded, fp16": (
        write_prefill._write_prefill,
        {"ROTATE": False, "X_TERMS": 2, "M": 64, **SMALL},
        {"num_warps": 4, "num_stages": 1},
        {**PREFILL_INPUTS, **dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*fp16")},
    ),
    "leave basis": (
        leave_basis._leave_basis,
        {"Hq": 32, "G": 4, "D": 128, "M": 64},
        {"num_warps": 4},
        {"o_ptr": "*fp16", "out_ptr": "*bf16"},
    ),
    "seal": (
        seal._seal,
        {"HOT": True, "DECODE": True, "OVERLAP": True, "Hkv": 8, "D": 128, **PLAIN},
        {"num_warps": 4, "enable_fp_fusion": False},
        {},
    ),
    "seal, chunk": (
        seal._seal,
        {"HOT": False, "DECODE": False, "OVERLAP": False, "Hkv": 3, "D": 64, **PLAIN},
        {"num_warps": 4, "enable_fp_fusion": False},
        {},
    ),
    "seal, refined": (
        seal._seal,
        {"HOT": True, "DECODE": True, "OVERLAP": True, "Hkv": 8, "D": 128, **FINE},
        {"num_warps": 4, "enable_fp_fusion": False},
        {},
    ),
}


@lru_cache
def compile_case(name: str, capability: int):
    """Triton's compiled kernel of a case."""
    kernel, constants, options, types = CASES[name]
    if capability < 90 and "OVERLAP" in constants:
        constants = {**constants, "OVERLAP": False}
    scalars = {"softmax_scale": "fp32", "out_ptr": "*fp32"}
    signature = {
        argument: "constexpr" if argument in constants else {**scalars, **POINTERS, **types}.get(argument, "i32")
        for argument in kernel.arg_names
    }
    # As in a launch: torch's allocations and rows are aligned.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.endswith("_stride")
    }
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def targets() -> list[tuple[str, int]]:
    """Every kernel for sm_90 and sm_80, but extend kernels for their own: Hopper has one of its own."""
    every = [(name, capability) for capability in (90, 80) for name in CASES]
    return [(name, on) for name, on in every if not name.startswith("extend") or CASES[name][0].is_gluon() == (on == 90)]


@pytest.mark.parametrize(("name", "capability"), targets())
def test_compiles(name, capability):
    compiled = compile_case(name, capability)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= (227 if capability == 90 else 163) * 1024


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("extend, hopper", "extend, dense"))])
def test_tensor_core_instructions_of_hopper_stay_asynchronous(name, tmp_path):
    compiled = compile_case(name, 90)
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [get_ptxas(90).path, "-v", "--gpu-name", "sm_90a", str(tmp_path / "kernel.ptx"), "-o", str(tmp_path / "kernel.cubin")]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "serialized" not in log, log
