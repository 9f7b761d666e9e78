"""The kernels of `mass` and `levels` compile for sm_90 and sm_80, without a GPU."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from oscar_radix.kernels import keep_queries, levels, mass, mass_records

TYPES = {
    **dict.fromkeys(("k_codes", "k_ptr", "s_ptr", "key_masks", "levels_ptr", "row_numbers"), "*u8"),
    **dict.fromkeys(("hot_k", "k_rows", "v_rows"), "*i8"),
    **dict.fromkeys(("scales", "hot_scales"), "*fp16"),
    **dict.fromkeys(("query_ptr", "lse_ptr", "key_step", "key_zero", "mass_ptr", "visits_ptr", "scores_ptr"), "*fp32"),
    **dict.fromkeys(("kept_query_ptr", "kept_lse_ptr"), "*fp32"),
    "rows_ptr": "*i64",
    "factor": "fp32",
    **dict.fromkeys(("row_masks", "hot_mask_ptr", "table_ptr", "slots_ptr", "blocks_ptr"), "*i32"),
    "softmax_scale": "fp32",
}
CASES = {
    "mass": (mass._add_mass, {"Hkv": 8, "G": 4, "GROUP": 4, "T": 1, "D": 128, "M": 16, "RECORDS": False}, "*i32"),
    "mass, 4 queries, D 64": (mass._add_mass, {"Hkv": 3, "G": 3, "GROUP": 4, "T": 4, "D": 64, "M": 16, "RECORDS": True}, "*i32"),
    "mass, 16 queries": (mass._add_mass, {"Hkv": 4, "G": 7, "GROUP": 8, "T": 16, "D": 128, "M": 128, "RECORDS": True}, "*i32"),
    "records": (mass_records.mass_records, {"Hkv": 8, "G": 4}, "*i32"),
    "records, 7 heads a group": (mass_records.mass_records, {"Hkv": 4, "G": 7}, "*i32"),
    "kept queries": (keep_queries._keep_queries, {"H": 28, "D": 128}, "*i32"),
    "levels": (levels._keep_rows, {"L": 36, "Hkv": 8, "D": 128}, "*i64"),
    "levels, D 64": (levels._keep_rows, {"L": 30, "Hkv": 3, "D": 64}, "*i64"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("capability", [90, 80])
def test_compiles(name, capability):
    kernel, constants, pages = CASES[name]
    types = {**TYPES, "pages_ptr": pages, "lengths_ptr": "*i64"}
    signature = {argument: "constexpr" if argument in constants else types.get(argument, "i32") for argument in kernel.arg_names}
    one_warp = {"num_warps": 1}
    options = {mass_records.mass_records: one_warp, keep_queries._keep_queries: one_warp, levels._keep_rows: {"num_warps": levels.WARPS}}
    options = options.get(kernel) or mass.launch_options(constants["M"])
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 48 * 1024
