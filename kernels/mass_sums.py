"""Sums of the mass table and its decay in one pass over it: mass of each slot, mass on hot rows, then times a factor.

The table is read and written once. Specification: `MassTable.slot_mass`, `covered_mass` and `decay` (oscar_radix.pool.mass).
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.pages import PAGE

PROGRAM_SLOTS = 32


@triton.jit(do_not_specialize=["count", "slots", "record_pages"])
def _sum_and_decay(
    values_ptr, row_masks, pages_ptr, slots_ptr, sums_ptr, count, slots, record_pages, factor, Hkv: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    item = tl.program_id(0) * R + tl.arange(0, R)
    layer = tl.program_id(1).to(tl.int64)
    there = item < count
    page = tl.load(pages_ptr + item, mask=there, other=0)
    slot = tl.load(slots_ptr + item, mask=there, other=0)
    token = tl.arange(0, PAGE)
    total = tl.zeros([R], tl.float32)
    covered = tl.zeros([R], tl.float32)
    for head in range(Hkv):
        at = values_ptr + (((layer * slots + slot) * Hkv + head) * PAGE)[:, None] + token[None, :]
        mass = tl.load(at, mask=there[:, None], other=0.0)
        mask = tl.load(row_masks + (layer * record_pages + page) * Hkv + head, mask=there, other=0)
        total += tl.sum(mass, 1)
        covered += tl.sum(tl.where(((mask[:, None] >> token[None, :]) & 1) != 0, mass, 0.0), 1)
        tl.store(at, mass * factor, mask=there[:, None])
    tl.atomic_add(sums_ptr + slot, total, mask=there, sem="relaxed")
    tl.atomic_add(sums_ptr + slots, tl.sum(covered, 0), sem="relaxed")


def sum_and_decay(
    values: torch.Tensor, row_masks: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, sums: torch.Tensor, factor: float
) -> None:
    """Sum the mass of tracked pages, then multiply it by `factor`.

    Args:
        values: float32 [L, S, Hkv, 32], of which the tracked slots are written.
        row_masks: int32 [L, P, Hkv], bit i: token i is hot.
        pages, slots: int64 [N], the tracked pages and their slots.
        sums: float32 [S + 1], added to: the mass of each slot, and of all hot rows together.
        factor: what remains.
    """
    layers, capacity, kv_heads, _ = values.shape
    if len(pages):
        _sum_and_decay[(triton.cdiv(len(pages), PROGRAM_SLOTS), layers)](
            values, row_masks, pages, slots, sums, len(pages), capacity, row_masks.shape[1], factor, Hkv=kv_heads, R=PROGRAM_SLOTS,
            num_warps=4,
        )  # fmt: skip
