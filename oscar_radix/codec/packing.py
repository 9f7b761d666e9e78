"""Codes to bytes and back: one shift and one mask on the packed bytes gives an operand, whatever the widths.

A K row of D channels takes D/4 bytes. Byte x holds the four channels i * D/4 + x, i = 0..3 (planes), one above the other, 8 bits
together; the bits of plane i start at bit 2i or above. Its *operand* i is (byte >> 2i) & mask[i, x]: the code, shifted by the
bits that it starts above 2i, which its static step makes good; a 0-bit channel reads as 0. Widths 2 2 2 2, 4 0 4 0 and 6 0 0 2 have
no shifts; of 3 1 3 1 the 1-bit codes read as 0 or 2, of 5 0 1 2 one does.
With every channel at 2 bits and D = 128 this is: byte x, bits 2i = channel 32i + x.
A V row is D/8 little-endian 16-bit words, 2 bits a channel: bits 2i of word e = channel (D/8) * i + e.
"""

import torch
from torch import Tensor

PLANES = 4
"""Operands in a byte of K."""

BYTE_BITS = 8


class KeyPacking:
    """Masks and shifts of K rows, from the widths of their channels.

    Args:
        widths: integer [..., D], D a multiple of 4.

    Attributes:
        masks: uint8 [..., 4, D/4], of the operands.
        lifts: uint8 [..., 4, D/4]: an operand is its code shifted left by this.

    Raises:
        ValueError: when the four channels of a byte have other than 8 bits, or one of them starts below its plane.
    """

    def __init__(self, widths: Tensor) -> None:
        if widths.shape[-1] % PLANES:
            raise ValueError(f"a K row has {widths.shape[-1]} channels; it must be a multiple of {PLANES}")
        planes = widths.long().unflatten(-1, (PLANES, -1))
        ends = planes.cumsum(-2)
        lifts = ends - planes - 2 * torch.arange(PLANES, device=widths.device).unsqueeze(-1)
        wrong = ((lifts < 0) & (planes > 0)).any(-2) | (ends[..., -1, :] != BYTE_BITS) | (planes < 0).any(-2)
        if bool(wrong.any()):
            got = planes.movedim(-2, -1)[wrong].unique(dim=0).tolist()
            raise ValueError(f"channels that share a byte must have {BYTE_BITS} bits together, plane i's from bit 2i on; got widths {got}")
        self.lifts = torch.where(planes > 0, lifts, 0).to(torch.uint8)
        self.masks = (((1 << planes) - 1) << self.lifts.long()).to(torch.uint8)

    @classmethod
    def of(cls, masks: Tensor, lifts: Tensor) -> "KeyPacking":
        """From masks and lifts that were checked before; they are kept as they are, not copied."""
        packing = cls.__new__(cls)
        packing.masks, packing.lifts = masks, lifts
        return packing

    def pack(self, codes: Tensor) -> Tensor:
        """uint8 codes [..., D], each below 2**width, to uint8 [..., D/4]; leading axes broadcast against the widths'."""
        operands = codes.unflatten(-1, (PLANES, -1)) << self.lifts
        packed = operands[..., 0, :].clone()
        for i in range(1, PLANES):
            packed |= operands[..., i, :] << (2 * i)
        return packed

    def operands_into(self, packed: Tensor, out: Tensor) -> None:
        """Write the operands of K rows uint8 [..., D/4] to `out` [..., D], of any dtype."""
        planes = out.unflatten(-1, (PLANES, -1))
        for i in range(PLANES):
            planes[..., i, :] = (packed >> (2 * i) if i else packed) & self.masks[..., i, :]

    @classmethod
    def even(cls, dim: int, device: torch.device | str) -> "KeyPacking":
        """2 bits a channel, in rows of `dim` channels."""
        return cls(torch.full((dim,), BYTE_BITS // PLANES, device=device))

    def unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `pack`: uint8 [..., D/4] to uint8 codes [..., D]."""
        operands = packed.new_empty(*packed.shape[:-1], packed.shape[-1] * PLANES)
        self.operands_into(packed, operands)
        return (operands.unflatten(-1, (PLANES, -1)) >> self.lifts).flatten(-2)


def pack_values(codes: Tensor) -> Tensor:
    """uint8 codes below 4, [..., D], to uint8 [..., D/4]: bytes 2e and 2e+1 are the low and high byte of word e."""
    planes = codes.unflatten(-1, (2, PLANES, -1))
    packed = planes[..., 0, :].clone()
    for i in range(1, PLANES):
        packed |= planes[..., i, :] << (2 * i)
    return packed.transpose(-1, -2).flatten(-2)


def unpack_values_into(packed: Tensor, out: Tensor) -> None:
    """Write the codes of V rows uint8 [..., D/4] to `out` [..., D], of any dtype."""
    halves = packed.unflatten(-1, (-1, 2)).transpose(-1, -2)
    planes = out.unflatten(-1, (2, PLANES, -1))
    for i in range(PLANES):
        planes[..., i, :] = (halves >> (2 * i) if i else halves) & 3


def unpack_values(packed: Tensor) -> Tensor:
    """Inverse of `pack_values`: uint8 [..., D/4] to uint8 [..., D]."""
    out = packed.new_empty(*packed.shape[:-1], packed.shape[-1] * PLANES)
    unpack_values_into(packed, out)
    return out
