"""One warp as a SIMT machine in Triton: every tensor is [32], one value a lane; PTX where Triton has no word for it.

With `num_warps=1` a [32] tensor is one register a lane, so `mma.sync` on such registers needs no layout conversion, no shared
memory and no barrier. Lane l has row g = l // 4 and column pair t = l % 4 of an MMA fragment (PTX ISA, "Matrix fragments for
mma.m16n8k16" and "...m16n8k32").
"""

import triton
import triton.language as tl


@triton.jit
def shuffle(x, lane):
    """Value of x in another lane."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=f,f,r", [x, lane], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def butterfly(x, DISTANCE: tl.constexpr):
    """Value of x in lane ^ DISTANCE, for DISTANCE 1 or 2: within the four lanes of a row."""
    if DISTANCE == 1:
        return tl.inline_asm_elementwise(
            "shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise("shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def row_sum(x):
    """Sum over the four lanes of a row."""
    x += butterfly(x, 1)
    return x + butterfly(x, 2)


@triton.jit
def row_max(x):
    """Maximum over the four lanes of a row."""
    x = tl.maximum(x, butterfly(x, 1))
    return tl.maximum(x, butterfly(x, 2))


@triton.jit
def exp2(x):
    """2**x, approximate, denormals flushed."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def half2(low, high):
    """Two float32 rounded to an fp16 pair in one word."""
    return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def unpack_half2(word):
    """The two fp16 of a word as float32."""
    return tl.inline_asm_elementwise(
        "{ .reg .f16 l, h; mov.b32 {l, h}, $2; cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }",
        "=f,=f,r", [word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def low_halves(a, b):
    """(low 16 bits of a, low 16 bits of b) in one word."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def high_halves(a, b):
    """(high 16 bits of a, high 16 bits of b) in one word."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def select_halves(a, b, selector):
    """Bytes of a and b by a lane's own selector: 0x5410 as `low_halves`, 0x7632 as `high_halves`."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, selector], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def load2(pointer):
    """Two 32-bit words of read-only data, 8-byte aligned, that will not be read again."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.L1::no_allocate.v2.b32 {$0, $1}, [$2];",
        "=r,=r,l", [pointer], dtype=(tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def load1(pointer):
    """One 32-bit word of read-only data that will not be read again."""
    return tl.inline_asm_elementwise("ld.global.nc.L1::no_allocate.b32 $0, [$1];", "=r,l", [pointer], dtype=tl.int32, is_pure=True, pack=1)


def _int8_asm(b_type: str) -> tl.constexpr:
    kind = f"mma.sync.aligned.m16n8k32.row.col.s32.s8.{b_type}.s32"
    return tl.constexpr(kind + " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};")


SIGNED, UNSIGNED = _int8_asm("s8"), _int8_asm("u8")


@triton.jit
def _mma_int8(a, b0, b1, c, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(
        ASM, "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def mma_int8(a, b0, b1, c):
    """C[16, 8] += A[16, 32] B[32, 8], int8 operands, int32 sums: `mma.m16n8k32`. a: 4 words; c: 4 words; returns 4 words."""
    return _mma_int8(a, b0, b1, c, SIGNED)


@triton.jit
def mma_int8_uint8(a, b0, b1, c):
    """`mma_int8` with B unsigned."""
    return _mma_int8(a, b0, b1, c, UNSIGNED)


@triton.jit
def mma_fp16(a, b0, b1, c):
    """C[16, 8] += A[16, 16] B[16, 8], fp16 operands, float32 sums: `mma.m16n8k16`. a: 4 words; c: 4 values; returns 4 values."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def load4(pointer):
    """Four 32-bit words of read-only data, 16-byte aligned."""
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l", [pointer], dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def interleave_low(a, b):
    """Bytes (a0, b0, a1, b1) in one word."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x5140;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def interleave_high(a, b):
    """Bytes (a2, b2, a3, b3) in one word."""
    return tl.inline_asm_elementwise("prmt.b32 $0, $1, $2, 0x7362;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def low_bytes_to_half2(word):
    """Bytes 0 and 1 of a word, offset by 128, as an fp16 pair: 0x6400 | b is 1024 + b, of which 1152 is taken off; exact."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 x; prmt.b32 x, $1, 0x64646464, 0x4140; sub.rn.f16x2 $0, x, $2; }",
        "=r,r,r", [word, tl.full([32], 0x64806480, tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def high_bytes_to_half2(word):
    """Bytes 2 and 3 of a word, offset by 128, as an fp16 pair."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 x; prmt.b32 x, $1, 0x64646464, 0x4342; sub.rn.f16x2 $0, x, $2; }",
        "=r,r,r", [word, tl.full([32], 0x64806480, tl.int32)], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def _bits(x):
    """A float32's word: a pointer and floats cannot be arguments of one inline PTX."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def store2(pointer, a, b, keep):
    """Two float32 to 8-byte aligned memory, where `keep`."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $4, 0; @p st.global.v2.b32 [$1], {$2, $3}; mov.b32 $0, 0; }",
        "=r,l,r,r,r", [pointer, _bits(a), _bits(b), keep.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def store4(pointer, a, b, c, d, keep):
    """Four float32 to 16-byte aligned memory, where `keep`."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $6, 0; @p st.global.v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }",
        "=r,l,r,r,r,r,r", [pointer, _bits(a), _bits(b), _bits(c), _bits(d), keep.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
