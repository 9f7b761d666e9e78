"""Codes to bytes and back: one shift and one mask on the packed bytes gives an operand.

A K row is a run of segments of width 4, 2 and 1. A segment of width w with n channels takes n*w/8 bytes; its byte x holds,
at bits w*i, its channel i*(n*w/8) + x. A 3-bit channel is two entries: its low 2 bits in the 2-bit segment, its top bit in
the 1-bit segment. With every channel at 2 bits and D = 128 this reads: byte x, bits 2i = channel 32i + x.
A V row is D/8 little-endian 16-bit words: bits 2i of word e = channel (D/8)*i + e.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

WIDTHS = (4, 3, 2, 1, 0)


@dataclass(frozen=True)
class Widths:
    """How many channels of a K row have 4, 3, 2, 1 and 0 bits, in this order: channels are sorted by falling width."""

    n4: int
    n3: int
    n2: int
    n1: int
    n0: int

    def __post_init__(self) -> None:
        for name, count in zip(("n4", "n3", "n2", "n1", "n0"), self.counts, strict=True):
            if count < 0 or count % 8:
                raise ValueError(f"{name} is {count}: each count must be a multiple of 8 channels, so that segments end on bytes")

    @property
    def counts(self) -> tuple[int, int, int, int, int]:
        return (self.n4, self.n3, self.n2, self.n1, self.n0)

    @property
    def channels(self) -> int:
        return sum(self.counts)

    @property
    def bits(self) -> int:
        return sum(w * n for w, n in zip(WIDTHS, self.counts, strict=True))

    @property
    def row_bytes(self) -> int:
        return self.bits // 8

    def per_channel(self) -> Tensor:
        """int64 [D]: the width of every channel."""
        return torch.repeat_interleave(torch.tensor(WIDTHS), torch.tensor(self.counts))

    @classmethod
    def from_per_channel(cls, widths: Tensor) -> "Widths":
        """The counts of a falling sequence of widths, int [D]."""
        result = cls(*(int((widths == w).sum()) for w in WIDTHS))
        if result.channels != widths.numel() or not torch.equal(result.per_channel(), widths.cpu().long()):
            raise ValueError(f"widths must fall from {WIDTHS[0]} to 0, got {widths.tolist()}")
        return result


def pack_segment(codes: Tensor, width: int) -> Tensor:
    """uint8 codes [..., n], each below 2**width, to uint8 [..., n*width/8]."""
    planes = 8 // width
    size = codes.shape[-1] // planes
    packed = codes[..., :size].clone()
    for i in range(1, planes):
        packed |= codes[..., i * size:(i + 1) * size] << (width * i)
    return packed


def unpack_segment(packed: Tensor, width: int) -> Tensor:
    """Inverse of `pack_segment`: uint8 [..., b] to uint8 [..., b*8/width]."""
    out = packed.new_empty(*packed.shape[:-1], packed.shape[-1] * 8 // width)
    unpack_segment_into(packed, width, out)
    return out


def unpack_segment_into(packed: Tensor, width: int, out: Tensor) -> None:
    """Write the codes of a segment to `out` [..., n], of any dtype."""
    size, mask = packed.shape[-1], (1 << width) - 1
    planes = 8 // width
    for i in range(planes):
        shifted = packed >> (width * i) if i else packed
        out[..., i * size:(i + 1) * size] = shifted if i == planes - 1 else shifted & mask


def pack_keys(codes: Tensor, widths: Widths) -> Tensor:
    """uint8 codes [..., D] to uint8 [..., widths.row_bytes]. Codes of 0-bit channels are not read."""
    n4, n3, n2, n1, _ = widths.counts
    end3, end2, end1 = n4 + n3, n4 + n3 + n2, n4 + n3 + n2 + n1
    threes = codes[..., n4:end3]
    parts = [
        pack_segment(codes[..., :n4], 4),
        pack_segment(torch.cat((threes & 3, codes[..., end3:end2]), -1), 2),
        pack_segment(torch.cat((threes >> 2, codes[..., end2:end1]), -1), 1),
    ]
    return torch.cat(parts, -1)


def unpack_keys_into(packed: Tensor, widths: Widths, out: Tensor) -> None:
    """Write the codes of K rows to `out` [..., D], of any dtype; 0-bit channels get 0."""
    n4, n3, n2, n1, _ = widths.counts
    end3, end2, end1 = n4 + n3, n4 + n3 + n2, n4 + n3 + n2 + n1
    byte2, byte1 = n4 // 2, n4 // 2 + (n3 + n2) // 4
    if n4:
        unpack_segment_into(packed[..., :byte2], 4, out[..., :n4])
    if n3 + n2:
        unpack_segment_into(packed[..., byte2:byte1], 2, out[..., n4:end2])
    if n3 + n1:
        ones = unpack_segment(packed[..., byte1:], 1)
        out[..., end2:end1] = ones[..., n3:]
        if n3:
            out[..., n4:end3] += ones[..., :n3] << 2
    out[..., end1:] = 0


def unpack_keys(packed: Tensor, widths: Widths) -> Tensor:
    """Inverse of `pack_keys`: uint8 [..., row_bytes] to uint8 [..., D]."""
    out = packed.new_empty(*packed.shape[:-1], widths.channels)
    unpack_keys_into(packed, widths, out)
    return out


def pack_values(codes: Tensor) -> Tensor:
    """uint8 codes below 4, [..., D], to uint8 [..., D/4]: bytes 2e and 2e+1 are the low and high byte of word e."""
    words = codes.shape[-1] // 8
    low, high = (pack_segment(half, 2) for half in (codes[..., :4 * words], codes[..., 4 * words:]))
    return torch.stack((low, high), -1).flatten(-2)


def unpack_values_into(packed: Tensor, out: Tensor) -> None:
    """Write the codes of V rows to `out` [..., D], of any dtype."""
    half = out.shape[-1] // 2
    unpack_segment_into(packed[..., 0::2], 2, out[..., :half])
    unpack_segment_into(packed[..., 1::2], 2, out[..., half:])


def unpack_values(packed: Tensor) -> Tensor:
    """Inverse of `pack_values`: uint8 [..., D/4] to uint8 [..., D]."""
    out = packed.new_empty(*packed.shape[:-1], packed.shape[-1] * 4)
    unpack_values_into(packed, out)
    return out
