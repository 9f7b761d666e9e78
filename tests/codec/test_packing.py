"""Packing is exact for every mix of widths, and lies in memory as the kernels read it."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oscar_radix.codec.packing import KeyPacking, pack_values, unpack_values

BYTES = [widths for widths in itertools.product(range(9), repeat=4) if sum(widths) == 8
         and all(not w or sum(widths[:i]) >= 2 * i for i, w in enumerate(widths))]  # fmt: skip
"""Every mix of widths that a byte may have."""


@st.composite
def width_mixes(draw):
    """Widths [3, D] of three heads, every byte of its own kind."""
    dim = draw(st.sampled_from([64, 128, 256]))
    heads = [draw(st.lists(st.sampled_from(BYTES), min_size=dim // 4, max_size=dim // 4)) for _ in range(3)]
    return torch.tensor(heads).transpose(1, 2).flatten(1)


@given(width_mixes(), st.integers(0, 2**31), st.integers(0, 5))
def test_keys_round_trip(widths, seed, rows):
    codes = torch.randint(0, 256, (rows, 3, 2, widths.shape[1]), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    codes &= ((1 << widths) - 1).to(torch.uint8).unsqueeze(1)
    packing = KeyPacking(widths.unsqueeze(1))
    packed = packing.pack(codes)
    assert packed.shape == (rows, 3, 2, widths.shape[1] // 4)
    assert torch.equal(packing.unpack(packed), codes)


@given(st.sampled_from([64, 128, 256]), st.integers(0, 2**31))
def test_values_round_trip(head_dim, seed):
    codes = torch.randint(0, 4, (3, head_dim), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(unpack_values(pack_values(codes)), codes)


def test_uniform_two_bit_key_row_of_128():
    codes = torch.arange(128, dtype=torch.uint8) * 7 % 4
    packed = KeyPacking(torch.full((128,), 2)).pack(codes)
    assert packed.tolist() == [sum(int(codes[32 * i + x]) << (2 * i) for i in range(4)) for x in range(32)]


def test_three_kinds_of_bytes_by_hand():
    # D = 12, so bytes of 4 channels at x, x + 3, x + 6, x + 9. Byte 0 is 4 + 0, byte 1 is 3 + 1, byte 2 is 2 + 2.
    packing = KeyPacking(torch.tensor([4, 3, 2, 0, 1, 2, 4, 3, 2, 0, 1, 2]))
    codes = torch.tensor([13, 5, 1, 0, 1, 2, 6, 7, 3, 0, 0, 1], dtype=torch.uint8)
    packed = packing.pack(codes)
    assert packed.tolist() == [13 + (6 << 4), 5 + (1 << 3) + (7 << 4) + (0 << 7), 1 + (2 << 2) + (3 << 4) + (1 << 6)]
    operands = torch.empty(12)
    packing.operands_into(packed, operands)
    assert operands.tolist() == [13, 5, 1, 0, 2, 2, 6, 7, 3, 0, 0, 1]  # the 1-bit channel reads as 0 or 2
    assert torch.equal(packing.unpack(packed), codes)


def test_codes_above_their_planes_by_hand():
    # Byte 0 is 6 + 0 + 0 + 2; byte 1 is 5 + 0 + 1 + 2, its 1-bit code at bit 5; byte 2 is 3 + 3 + 0 + 2, the second code from bit 3.
    packing = KeyPacking(torch.tensor([6, 5, 3, 0, 0, 3, 0, 1, 0, 2, 2, 2]))
    codes = torch.tensor([45, 21, 5, 0, 0, 6, 0, 1, 0, 3, 2, 1], dtype=torch.uint8)
    packed = packing.pack(codes)
    assert packed.tolist() == [45 + (3 << 6), 21 + (1 << 5) + (2 << 6), 5 + (6 << 3) + (1 << 6)]
    operands = torch.empty(12)
    packing.operands_into(packed, operands)
    assert operands.tolist() == [45, 21, 5, 0, 0, 12, 0, 2, 0, 3, 2, 1]
    assert torch.equal(packing.unpack(packed), codes)


def test_value_words():
    codes = torch.arange(128, dtype=torch.uint8) * 5 % 4
    words = pack_values(codes).view(torch.int16)
    assert words.numel() == 16
    for e in range(16):
        assert (int(words[e]) & 0xFFFF) == sum(int(codes[16 * i + e]) << (2 * i) for i in range(8))


@pytest.mark.parametrize("widths", [[2, 1, 2, 2], [1, 3, 2, 2], [2, 2, 2, 3]])
def test_widths_that_do_not_share_a_byte_are_refused(widths):
    with pytest.raises(ValueError, match=f"must have 8 bits together, .* got widths {re.escape(str([widths]))}"):
        KeyPacking(torch.tensor(widths))


def test_half_a_byte_is_refused():
    with pytest.raises(ValueError, match="6 channels"):
        KeyPacking(torch.tensor([2] * 6))
