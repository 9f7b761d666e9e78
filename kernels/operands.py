"""fp16 tensor-core operands from stored bytes, two an instruction; a pair of fp16 is one 32-bit word, the lower channel below.

A byte b beside 0x64 is the fp16 number 1024 + b, exactly, and a 2-bit code at bits 2p of a 16-bit word that is otherwise 0x6400 is
1024 + code * 4**p; one subtraction or one fused multiply-add leaves the number. All tensors are int32 (words keep their registers in
loops, bytes do not), and all functions are plain elementwise Triton, so that Gluon kernels use them as well.
"""

import triton
import triton.language as tl

KEYS = tl.constexpr("""{
    .reg .b32 x, low, high, base;
    mov.b32 base, 0x64006400;
    and.b32 x, $2, $3;
    prmt.b32 low, x, 0x64646464, 0x4140;
    prmt.b32 high, x, 0x64646464, 0x4342;
    sub.rn.f16x2 low, low, base;
    sub.rn.f16x2 high, high, base;
    fma.rn.f16x2 low, low, $4, $6;
    fma.rn.f16x2 high, high, $5, $7;
    mul.rn.f16x2 $0, low, $8;
    mul.rn.f16x2 $1, high, $8;
}""")

ROWS = tl.constexpr("""{
    .reg .b32 x, low, high, base;
    mov.b32 base, 0x64806480;
    xor.b32 x, $2, 0x80808080;
    prmt.b32 low, x, 0x64646464, 0x4140;
    prmt.b32 high, x, 0x64646464, 0x4342;
    sub.rn.f16x2 low, low, base;
    sub.rn.f16x2 high, high, base;
    mul.rn.f16x2 $0, low, $3;
    mul.rn.f16x2 $1, high, $3;
}""")


def _value_plane(plane: int) -> str:
    """PTX for (code - 1.5) * scale of V plane `plane`: bits 2 * plane of a 16-bit word, brought to place 1..4."""
    move, place = ("shl.b32 x, $1, 2;", 1) if plane == 0 else ("mov.b32 x, $1;", plane) if plane < 5 else ("shr.u32 x, $1, 6;", plane - 3)
    mask = (3 << 2 * place) * 0x10001
    # 4**-place, and -(1024 * 4**-place + 1.5): both exact in fp16 from place 1 on.
    unit, shift = {1: (0x3400, 0xDC06), 2: (0x2C00, 0xD418), 3: (0x2400, 0xCC60), 4: (0x1C00, 0xC580)}[place]
    return f"""{{
    .reg .b32 x, unit, shift;
    {move}
    and.b32 x, x, {mask};
    or.b32 x, x, 0x64006400;
    mov.b32 unit, {unit * 0x10001};
    mov.b32 shift, {shift * 0x10001};
    fma.rn.f16x2 x, x, unit, shift;
    mul.rn.f16x2 $0, x, $2;
}}"""


LOW_MASKS = tl.constexpr((0x03030303, 0x0C0C0C0C, 0x30303030, 0xC0C0C0C0 - (1 << 32)))
"""Low bits of K plane i in four bytes: 0x03030303 << 2i, as int32."""
VALUES = tl.constexpr(tuple(_value_plane(plane) for plane in range(8)))


@triton.jit
def pair(low, high):
    """Two float32 rounded to a pair of fp16."""
    return tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def pair_sum(a, b):
    """Sums of two pairs of fp16, rounded."""
    return tl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def twice(x):
    """A pair of the same fp16 number."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001


@triton.jit
def key_plane(codes, mask, step_low, step_high, shift_low, shift_high, scale):
    """Keys of one K plane i: ((byte & mask) * step + shift) * scale, pairs [N, W, 2] of packed words [N, W].

    Arguments broadcast: mask [1, W], four bytes in place (mask << 2i); steps and shifts [1, W], pairs of the word's channels 0, 1
    and 2, 3: static step / 4**i, and minus zero point times step; scale [N, 1], a pair.
    """
    low, high = tl.inline_asm_elementwise(
        KEYS, "=&r,=&r,r,r,r,r,r,r,r", [codes, mask, step_low, step_high, shift_low, shift_high, scale], dtype=(tl.int32, tl.int32),
        is_pure=True, pack=1,
    )  # fmt: skip
    return tl.join(low, high)


@triton.jit
def value_plane(words, scale, plane: tl.constexpr):
    """Values of V plane `plane` (0..7): (code - 1.5) * scale, pairs [N, W] of packed words [N, W]; scale [N, 1], a pair."""
    return tl.inline_asm_elementwise(VALUES[plane], "=&r,r,r", [words, scale], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def int8_rows(words, scale):
    """int8 rows, words [N, D / 4], times their scales, pairs [N, 1]: pairs [N, D / 2]."""
    low, high = tl.inline_asm_elementwise(
        ROWS, "=&r,=&r,r,r", [words, scale], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
    )  # fmt: skip
    return tl.reshape(tl.join(low, high), (words.shape[0], 2 * words.shape[1]))


@triton.jit
def record_keys(codes, constants, scale):
    """Keys, pairs [N, D / 2], of packed words [N, D / 16], channels in order.

    Args:
        constants: for each of the four planes mask, step_low, step_high, shift_low, shift_high; see `key_plane`.
        scale: [N, 1], pairs.
    """
    p0 = key_plane(codes, constants[0], constants[1], constants[2], constants[3], constants[4], scale)
    p1 = key_plane(codes, constants[5], constants[6], constants[7], constants[8], constants[9], scale)
    p2 = key_plane(codes, constants[10], constants[11], constants[12], constants[13], constants[14], scale)
    p3 = key_plane(codes, constants[15], constants[16], constants[17], constants[18], constants[19], scale)
    planes = tl.join(tl.join(p0, p2), tl.join(p1, p3))
    return tl.reshape(tl.permute(planes, (0, 3, 4, 1, 2)), (codes.shape[0], 8 * codes.shape[1]))


@triton.jit
def record_values(words, scale):
    """Values, pairs [N, D / 2], of packed words [N, D / 16], channels in order; scale [N, 1], pairs."""
    p04 = tl.join(value_plane(words, scale, 0), value_plane(words, scale, 4))
    p15 = tl.join(value_plane(words, scale, 1), value_plane(words, scale, 5))
    p26 = tl.join(value_plane(words, scale, 2), value_plane(words, scale, 6))
    p37 = tl.join(value_plane(words, scale, 3), value_plane(words, scale, 7))
    planes = tl.join(tl.join(p04, p26), tl.join(p15, p37))
    return tl.reshape(tl.permute(planes, (0, 2, 3, 4, 1)), (words.shape[0], 8 * words.shape[1]))


@triton.jit
def halves(pairs):
    """Pairs [N, D / 2] as fp16 [N, D]."""
    low = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.reshape(tl.join(low, high), (pairs.shape[0], 2 * pairs.shape[1]))
