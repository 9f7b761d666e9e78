"""The kernels of `mass` and `levels` compile for sm_90 and sm_80, without a GPU."""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from oscar_radix.kernels import keep_queries, levels, mass, mass_records, mass_sums

TYPES = {
    **dict.fromkeys(("k_codes", "k_low", "k_ptr", "s_ptr", "key_masks", "levels_ptr", "row_numbers"), "*u8"),
    **dict.fromkeys(("hot_k", "k_rows", "v_rows"), "*i8"),
    **dict.fromkeys(("scales", "hot_scales"), "*fp16"),
    **dict.fromkeys(("query_ptr", "lse_ptr", "key_step", "key_zero", "mass_ptr", "visits_ptr", "scores_ptr"), "*fp32"),
    **dict.fromkeys(("kept_query_ptr", "kept_lse_ptr"), "*fp32"),
    "rows_ptr": "*i64",
    "factor": "fp32",
    **dict.fromkeys(("row_masks", "hot_mask_ptr", "table_ptr", "blocks_ptr", "entries", "chunks", "low_places"), "*i32"),
    **dict.fromkeys(("values_ptr", "sums_ptr"), "*fp32"),
    **dict.fromkeys(("pages_ptr", "slots_ptr", "lengths_ptr"), "*i64"),
    "softmax_scale": "fp32",
}
MASS = {
    "mass": {"Hkv": 8, "G": 4, "GROUP": 4, "D": 128, "M": 16, "RECORDS": False, "REFINED": False},
    "mass, 4 queries, D 64": {"Hkv": 3, "G": 3, "GROUP": 4, "D": 64, "M": 16, "RECORDS": True, "REFINED": True},
    "mass, 16 queries": {"Hkv": 4, "G": 7, "GROUP": 8, "D": 128, "M": 128, "RECORDS": True, "REFINED": False},
}
CASES = {
    **{name: (mass._add_mass, constants, mass.launch_options(constants["M"])) for name, constants in MASS.items()},
    "records": (mass_records.mass_records, {"Hkv": 8, "G": 4, "REFINED": False}, {"num_warps": 1}),
    "records, 7 heads a group, refined": (mass_records.mass_records, {"Hkv": 4, "G": 7, "REFINED": True}, {"num_warps": 1}),
    "sums": (mass_sums._sum_and_decay, {"Hkv": 8, "R": mass_sums.PROGRAM_SLOTS}, {"num_warps": 4}),
    "kept queries": (keep_queries._keep_queries, {"H": 28, "D": 128}, {"num_warps": 1}),
    "levels": (levels._keep_rows, {"L": 36, "Hkv": 8, "D": 128}, {"num_warps": levels.WARPS}),
    "levels, D 64": (levels._keep_rows, {"L": 30, "Hkv": 3, "D": 64}, {"num_warps": levels.WARPS}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("capability", [90, 80])
def test_compiles(name, capability):
    kernel, constants, options = CASES[name]
    signature = {argument: "constexpr" if argument in constants else TYPES.get(argument, "i32") for argument in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", capability, 32), options=options)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= 48 * 1024
