"""Reverse water-filling in widths that share bytes: four channels of 0 to 6 bits, 8 bits together.

Every such allocation has 2 bits a channel on average and is read by one shift and one mask (see `packing`). Which widths a byte may
have depends on where it stands: kernels keep the masks of all bytes in registers, and there is room for five words of them. Where
variances fall geometrically by 10**4 over a row of 64, the allocation makes 2 % more error than the best free choice of 0 to 6 bits,
and the best of at most 4 bits makes 33 % more; by 10**5, 7 % and 108 %.
"""

import torch
from torch import Tensor

from oscar_radix.codec.packing import PLANES, KeyPacking
from oscar_radix.codec.uniform import GAUSSIAN_MSE

WORD_BYTES = 4
WIDE = ((6, 0, 0, 2), (5, 0, 1, 2), (4, 0, 2, 2), (4, 1, 1, 2), (3, 3, 0, 2), (3, 2, 1, 2), (2, 2, 2, 2))
"""Widths of the bytes of even 32-bit words: the last plane has 2 bits, so that its mask is a constant."""
NARROW = ((4, 0, 4, 0), (3, 1, 3, 1), (2, 2, 2, 2))
"""Widths of the bytes of odd words: the two nibbles are alike, so that two planes share a mask."""
PATTERNS = (*WIDE, *NARROW)
OPERAND_SUM_MAX = 1040
"""Largest sum of a row's operands: 4032 (`kernels.fixed_point.QUERY_LEVELS`) times it stays below 2**22."""
_EVEN = (len(WIDE) - 1, len(PATTERNS) - 1)
"""Places in PATTERNS of 2 bits everywhere."""
_CHANNELS = torch.tensor([[pattern.count(width) for width in range(6, -1, -1)] for pattern in PATTERNS])
"""Channels of 6 to 0 bits of each of PATTERNS."""
OPERAND_TOPS = KeyPacking(torch.tensor(PATTERNS)).masks.sum((-2, -1))
"""Sum of the largest operands of each of PATTERNS."""
LOW_BITS = 2
"""Of every channel of K and V in a refined layer, beside its record: code = 4 * (the record's) + low."""
_LIFTED = (KeyPacking(torch.tensor(PATTERNS)).lifts > 0).flatten(-2).any(-1)
"""Which of PATTERNS have a code that does not start at bit 2i: not for refined layers, whose operands are codes."""


def _edges(counts: Tensor) -> Tensor:
    """Ranks at which the width falls, int64 [..., 8]: channels of rank edges[6 - w] to edges[7 - w] - 1 have w bits."""
    ends = (counts @ _CHANNELS).cumsum(-1)
    return torch.cat((torch.zeros_like(ends[..., :1]), ends), -1)


def expected_error(counts: Tensor, variances: Tensor, low_bits: int = 0) -> Tensor:
    """sum_c variances_c * mse(width_c + low_bits), float64 [...]: bytes of each of PATTERNS int64 [..., 10], variances [..., D] falling."""
    below = torch.cat((torch.zeros_like(variances[..., :1]), variances.cumsum(-1)), -1)
    at = _edges(counts)
    sums = below.expand(*at.shape[:-1], below.shape[-1]).gather(-1, at).diff(dim=-1)
    return (sums * torch.tensor([GAUSSIAN_MSE[width + low_bits] for width in range(6, -1, -1)], dtype=torch.float64)).sum(-1)


def best_counts(variances: Tensor, low_bits: int = 0) -> Tensor:
    """How many bytes of a row have each of PATTERNS: int64 [..., 10]; all its wide and all its narrow ones.

    From 2 bits everywhere, the change of one byte or of one wide and one narrow byte that removes most error, as long as one does.

    Args:
        variances: float64 [..., D], falling along the last axis.
        low_bits: of every channel on top, in a refined layer.
    """
    flat = variances.reshape(-1, variances.shape[-1])
    counts = torch.zeros(len(flat), len(PATTERNS), dtype=torch.int64)
    counts[:, _EVEN] = variances.shape[-1] // PLANES // 2
    moves = _moves()
    if low_bits:
        moves = moves[(moves[:, _LIFTED] == 0).all(-1)]
    error = expected_error(counts, flat, low_bits)
    while True:
        now = counts.unsqueeze(1)
        allowed = (now + moves >= 0).all(-1, keepdim=True) & (((now + moves) @ OPERAND_TOPS).unsqueeze(-1) <= OPERAND_SUM_MAX)
        least, move = expected_error(torch.where(allowed, now + moves, now), flat.unsqueeze(1), low_bits).min(-1)
        better = least < error * (1 - 1e-12)
        if not bool(better.any()):
            return counts.view(*variances.shape[:-1], len(PATTERNS))
        counts = torch.where(better.unsqueeze(-1), counts + moves[move], counts)
        error = torch.where(better, least, error)


def is_readable(masks: Tensor) -> bool:
    """Whether kernels read rows with these masks of `KeyPacking`, uint8 [..., 4, D/4], as they are: see WIDE, NARROW, OPERAND_SUM_MAX."""
    wide = _wide(masks.shape[-1])
    constant = masks[..., 3, :][..., wide] == 3
    alike = masks[..., :2, :][..., ~wide] == masks[..., 2:, :][..., ~wide]
    return bool(constant.all() and alike.all() and (masks.sum((-2, -1)) <= OPERAND_SUM_MAX).all())


def _wide(size: int) -> Tensor:
    """Bool [size]: which bytes of a row may have the patterns of WIDE; the others those of NARROW."""
    return torch.arange(size) // WORD_BYTES % 2 == 0


def _moves() -> Tensor:
    """Changes of counts: a byte from one pattern to another of its kind, in wide bytes, in narrow ones, and in one of each."""
    single = []
    for first, last in ((0, len(WIDE)), (len(WIDE), len(PATTERNS))):
        unit = torch.eye(len(PATTERNS), dtype=torch.int64)[first:last]
        changes = (unit.unsqueeze(0) - unit.unsqueeze(1)).flatten(0, 1)
        single.append(changes[changes.abs().sum(-1) > 0])
    both = (single[0].unsqueeze(1) + single[1].unsqueeze(0)).flatten(0, 1)
    return torch.cat((*single, both))


def place(counts: list[int], dim: int) -> tuple[Tensor, Tensor]:
    """Which channel goes where in a row.

    Args:
        counts: bytes of each of PATTERNS, half of the row's wide and half narrow.
        dim: channels D of a row, a multiple of 32.

    Returns:
        order int64 [D]: place p of a row holds the channel of rank order[p], rank 0 having the largest variance;
        widths int64 [D], of the places.

    Raises:
        ValueError: when the counts do not fill a row of `dim` channels.
    """
    size = dim // PLANES
    if min(counts) < 0 or [sum(counts[: len(WIDE)]), sum(counts[len(WIDE) :])] != [size // 2, size // 2]:
        raise ValueError(f"a row of {dim} channels has {size // 2} bytes of each kind, wide and narrow; asked for {counts}")
    wide = _wide(size)
    kinds = torch.tensor(PATTERNS).repeat_interleave(torch.tensor(counts), 0)
    widths = torch.empty(size, PLANES, dtype=torch.int64)
    widths[wide], widths[~wide] = kinds[: size // 2], kinds[size // 2 :]
    widths = widths.T.flatten()
    order = torch.empty(dim, dtype=torch.int64)
    order[torch.sort(widths, descending=True, stable=True).indices] = torch.arange(dim)
    return order, widths
