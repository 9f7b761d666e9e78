"""fp16 tensor-core operands from stored bytes, two or four elements an instruction.

A byte b below 0x64 is the fp16 number 1024 + b, exactly, and a 2-bit code at bits 2p of a 16-bit word that is otherwise 0x6400 is
1024 + code * 4**p; one subtraction or one fused multiply-add leaves the number. Elements that one thread holds must be contiguous
by fours (bytes) or twos (words). The functions are plain elementwise Triton, so that Gluon kernels use them as well.
"""

import triton
import triton.language as tl

_KEYS = """{
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
    mul.rn.f16x2 $1, high, $9;
}"""
KEYS = tl.constexpr(_KEYS)

_ROWS = """{
    .reg .b32 x, low, high, base;
    mov.b32 base, 0x64806480;
    xor.b32 x, $2, 0x80808080;
    prmt.b32 low, x, 0x64646464, 0x4140;
    prmt.b32 high, x, 0x64646464, 0x4342;
    sub.rn.f16x2 low, low, base;
    sub.rn.f16x2 high, high, base;
    mul.rn.f16x2 $0, low, $3;
    mul.rn.f16x2 $1, high, $4;
}"""
ROWS = tl.constexpr(_ROWS)


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


VALUES = tl.constexpr(tuple(_value_plane(plane) for plane in range(8)))


@triton.jit
def key_plane(codes, masks, steps, shifts, scales):
    """Keys of one K plane i: ((byte & mask) * step + shift) * scale, fp16.

    Arguments broadcast: codes uint8 [N, Q]; masks uint8 [1, Q], in place (mask << 2i); steps, shifts fp16 [1, Q]: static step / 4**i,
    and minus zero point times step; scales fp16 [N, 1].
    """
    return tl.inline_asm_elementwise(
        KEYS, "=&r,=&r,r,r,r,r,r,r,r,r", [codes, masks, steps, shifts, scales], dtype=tl.float16, is_pure=True, pack=4
    )


@triton.jit
def value_plane(words, scales, plane: tl.constexpr):
    """Values of V plane `plane` (0..7): (code - 1.5) * scale, fp16; words int16 [N, D / 8], scales fp16 [N, 1]."""
    return tl.inline_asm_elementwise(VALUES[plane], "=&r,r,r", [words, scales], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def int8_rows(rows, scales):
    """Rows int8 [N, D] times their scales fp16 [N, 1]: fp16."""
    return tl.inline_asm_elementwise(ROWS, "=&r,=&r,r,r,r", [rows, scales], dtype=tl.float16, is_pure=True, pack=4)


@triton.jit
def record_keys(codes, masks, steps, shifts, scales):
    """Keys [N, D] of packed bytes [N, D / 4], channels in order; masks, steps, shifts: of the four planes. See `key_plane`."""
    even = tl.join(
        key_plane(codes, masks[0], steps[0], shifts[0], scales), key_plane(codes, masks[2], steps[2], shifts[2], scales)
    )  # fmt: skip
    odd = tl.join(
        key_plane(codes, masks[1], steps[1], shifts[1], scales), key_plane(codes, masks[3], steps[3], shifts[3], scales)
    )  # fmt: skip
    planes = tl.join(even, odd)
    return tl.reshape(tl.permute(planes, (0, 2, 3, 1)), (codes.shape[0], 4 * codes.shape[1]))


@triton.jit
def record_values(words, scales):
    """Values [N, D] of 16-bit words [N, D / 8], channels in order. See `value_plane`."""
    first = tl.join(
        tl.join(value_plane(words, scales, 0), value_plane(words, scales, 4)), tl.join(value_plane(words, scales, 2), value_plane(words, scales, 6))
    )  # fmt: skip
    second = tl.join(
        tl.join(value_plane(words, scales, 1), value_plane(words, scales, 5)), tl.join(value_plane(words, scales, 3), value_plane(words, scales, 7))
    )  # fmt: skip
    planes = tl.join(first, second)
    return tl.reshape(tl.permute(planes, (0, 2, 3, 4, 1)), (words.shape[0], 8 * words.shape[1]))
