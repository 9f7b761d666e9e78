"""Packing is exact for every mix of widths, and lies in memory as the kernels read it."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oscar_radix.codec.packing import Widths, pack_keys, pack_segment, pack_values, unpack_keys, unpack_segment, unpack_values


@st.composite
def width_mixes(draw):
    head_dim = draw(st.sampled_from([64, 128, 256]))
    cuts = sorted(draw(st.lists(st.integers(0, head_dim // 16), min_size=4, max_size=4)))
    edges = [0, *[16 * c for c in cuts], head_dim]
    return Widths(*(b - a for a, b in itertools.pairwise(edges)))


@given(width_mixes(), st.integers(0, 2**31), st.integers(0, 5))
def test_keys_round_trip(widths, seed, rows):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, 2, widths.channels), generator=draw, dtype=torch.uint8)
    codes &= ((1 << widths.per_channel()) - 1).to(torch.uint8)
    packed = pack_keys(codes, widths)
    assert packed.shape == (rows, 2, widths.row_bytes)
    assert torch.equal(unpack_keys(packed, widths), codes)


@given(st.sampled_from([64, 128, 256]), st.integers(0, 2**31))
def test_values_round_trip(head_dim, seed):
    codes = torch.randint(0, 4, (3, head_dim), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert torch.equal(unpack_values(pack_values(codes)), codes)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_bits_of_a_segment(width):
    n = 32
    codes = torch.randint(0, 1 << width, (n,), generator=torch.Generator().manual_seed(width), dtype=torch.uint8)
    packed = pack_segment(codes, width)
    size = n * width // 8
    for x in range(size):
        for i in range(8 // width):
            assert (int(packed[x]) >> (width * i)) & ((1 << width) - 1) == int(codes[i * size + x])
    assert torch.equal(unpack_segment(packed, width), codes)


def test_uniform_two_bit_key_row_of_128():
    codes = torch.arange(128, dtype=torch.uint8) * 7 % 4
    packed = pack_keys(codes, Widths(0, 0, 128, 0, 0))
    assert packed.tolist() == [sum(int(codes[32 * i + x]) << (2 * i) for i in range(4)) for x in range(32)]


def test_three_bit_channels_split_into_low_bits_and_top_bit():
    # 8 channels of 3 bits, all 6 = 0b110: low bits 2 in every pair of the 2-bit segment, top bits 1.
    assert pack_keys(torch.full((8,), 6, dtype=torch.uint8), Widths(0, 8, 0, 0, 0)).tolist() == [0b10101010, 0b10101010, 0b11111111]


def test_value_words():
    codes = torch.arange(128, dtype=torch.uint8) * 5 % 4
    words = pack_values(codes).view(torch.int16)
    assert words.numel() == 16
    for e in range(16):
        assert (int(words[e]) & 0xFFFF) == sum(int(codes[16 * i + e]) << (2 * i) for i in range(8))


def test_widths_must_fall():
    with pytest.raises(ValueError, match="must fall"):
        Widths.from_per_channel(torch.tensor([2] * 8 + [4] * 8))
    with pytest.raises(ValueError, match="n4 is 4"):
        Widths(4, 0, 0, 0, 0)
