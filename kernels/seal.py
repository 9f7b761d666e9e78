"""Make the 2-bit records of full pages from their int8 rows; bit-identical to the specification (`SteppedCodec.seal`).

Row energies are sums of integers, exact in float64, so no order of summation shows. Fused multiply-add is switched off: the
codes are floors of two roundings, as in torch.
"""

import torch
import triton
import triton.language as tl

from oscar_radix.kernels.capability import compute_capability
from oscar_radix.kernels.pages import BLOCK_ROWS, PAGE, PAGE_BLOCKS, value_channels


@triton.jit
def _row_scale(size, scale):
    """fp16 [32]: float64 sizes of rows of codes times the scale of the codes; rounded to float32 first, as torch does."""
    return tl.minimum(size * scale.to(tl.float64), 65504.0).to(tl.float32).to(tl.float16)


@triton.jit
def _codes(rows, ratio, inverse_step, top):
    """floor(row * ratio * inverse_step + (top + 1) / 2), clamped to 0..top: int32 [32, n]."""
    scaled = rows.to(tl.float32) * ratio[:, None] * inverse_step[None, :] + ((top + 1.0) / 2.0)[None, :]
    return tl.minimum(tl.maximum(tl.floor(scaled), 0.0), top[None, :]).to(tl.int32)


@triton.jit
def _seal(
    pages_ptr, starts_ptr, k8, v8, row_scales, table_ptr, k_codes, v_codes, scales, k_low, v_low,
    energy_weights, energy_unit, inverse_step, top_ptr, masks_ptr, value_unit,
    HOT: tl.constexpr, DECODE: tl.constexpr, OVERLAP: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, REFINED: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    item = tl.program_id(0)
    head = tl.program_id(1)
    Q: tl.constexpr = D // 4
    token = tl.arange(0, PAGE)
    channel = tl.arange(0, Q)
    page = tl.load(pages_ptr + item).to(tl.int64)
    if DECODE:
        # pages_ptr holds the slot of the newest token: its page is full when that is the 32nd.
        full = (page % PAGE == PAGE - 1) & (page >= PAGE)
        page = page // PAGE
    else:
        full = page > 0
    if full:
        if HOT:
            block = tl.load(table_ptr + page * PAGE_BLOCKS + token // BLOCK_ROWS).to(tl.int64)
            row = (block * Hkv + head) * BLOCK_ROWS + token % BLOCK_ROWS
        else:
            row = (tl.load(starts_ptr + item).to(tl.int64) + token) * Hkv + head
        record = (page * Hkv + head) * PAGE + token
        k_scale = tl.load(row_scales + row * 2)
        v_scale = tl.load(row_scales + row * 2 + 1)

        energy = tl.zeros([PAGE], tl.float64)
        for plane in tl.static_range(4):
            x = tl.load(k8 + row[:, None] * D + plane * Q + channel[None, :]).to(tl.float64)
            energy += tl.sum(x * x * tl.load(energy_weights + head * D + plane * Q + channel)[None, :], 1)
        k_row = _row_scale(tl.sqrt(energy * tl.load(energy_unit + head)), k_scale)
        wide = k_row.to(tl.float32)
        ratio = tl.where(wide > 0, tl.div_rn(k_scale.to(tl.float32), tl.where(wide > 0, wide, 1.0)), 0.0)
        packed = tl.zeros([PAGE, Q], tl.int32)
        below = tl.zeros([PAGE, Q], tl.int32)
        for plane in tl.static_range(4):
            at = head * D + plane * Q + channel
            x = tl.load(k8 + row[:, None] * D + plane * Q + channel[None, :])
            top = tl.load(top_ptr + at)
            code = _codes(x, ratio, tl.load(inverse_step + at), top)
            if REFINED:
                below |= (code & 3) << (2 * plane)
                code = code >> 2
            # A code starts at the lowest bit of its mask (see `codec.packing`).
            mask = tl.load(masks_ptr + at).to(tl.int32)
            packed |= (code * (mask & -mask)[None, :]) << (2 * plane)
        tl.store(k_codes + record[:, None] * Q + channel[None, :], packed.to(tl.uint8))
        if REFINED:
            tl.store(k_low + record[:, None] * Q + channel[None, :], below.to(tl.uint8))

        energy = tl.zeros([PAGE], tl.float64)
        for plane in tl.static_range(4):
            x = tl.load(v8 + row[:, None] * D + plane * Q + channel[None, :]).to(tl.float64)
            energy += tl.sum(x * x, 1)
        v_row = _row_scale(tl.sqrt(energy * tl.load(value_unit)), v_scale)
        wide = v_row.to(tl.float32)
        ratio = tl.where(wide > 0, tl.div_rn(v_scale.to(tl.float32), tl.where(wide > 0, wide, 1.0)), 0.0)
        packed = tl.zeros([PAGE, Q], tl.int32)
        below = tl.zeros([PAGE, Q], tl.int32)
        along = tl.zeros([PAGE], tl.int32)
        ones = tl.full([Q], 1.0, tl.float32)
        for plane in tl.static_range(4):
            x = tl.load(v8 + row[:, None] * D + value_channels(plane, D)[None, :])
            code = _codes(x, ratio, ones * 4.0, ones * 15.0) if REFINED else _codes(x, ratio, ones, ones * 3.0)
            along += tl.sum(x.to(tl.int32) * (2 * code - (15 if REFINED else 3)), 1)
            if REFINED:
                below |= (code & 3) << (2 * plane)
                code = code >> 2
            packed |= code << (2 * plane)
        # The scale at which the codes are read without bias (`codec.uniform.unbiased_scale`).
        v_row = _row_scale(tl.where(along > 0, (8.0 if REFINED else 2.0) * energy / tl.maximum(along, 1).to(tl.float64), 0.0), v_scale)
        tl.store(v_codes + record[:, None] * Q + channel[None, :], packed.to(tl.uint8))
        if REFINED:
            tl.store(v_low + record[:, None] * Q + channel[None, :], below.to(tl.uint8))
        tl.store(scales + record * 2, k_row)
        tl.store(scales + record * 2 + 1, v_row)


def seal(
    pages: torch.Tensor,
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    records: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    parameters: tuple[torch.Tensor, ...],
    block_table: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    newest_slots: bool = False,
    low: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> None:
    """Write the records of full pages of one layer.

    Args:
        pages: int64 [N], page numbers; with `newest_slots` the slots of the newest tokens instead: pages that these do not
            complete are left alone, so that a decode step can call this without knowing.
        rows: k8, v8 int8 and scales fp16 (K, V). With `block_table`: the hot pool's, [blocks, Hkv, 2, ...]; with `starts`: of the
            chunk, [T, Hkv, ...].
        records: k_codes, v_codes uint8 [P, Hkv, 32, D/4], scales fp16 [P, Hkv, 32, 2]; written.
        parameters: energy_weights float64 [Hkv, D], energy_unit float64 [Hkv], inverse_step, top float32 [Hkv, D], masks uint8
            [Hkv, 4, D/4], value_unit float64 [] of a `SteppedCodec`.
        block_table: int32 [P, 16].
        starts: int64 [N], index of each page's first token in the chunk.
        low: of a refined layer, its low bits of K and V, uint8 [P, Hkv, 32, D/4]; written.
    """
    if (block_table is None) == (starts is None):
        raise ValueError("a page's rows are either in the hot pool (block_table) or in the chunk (starts)")
    if not len(pages):
        return
    kv_heads, dim = parameters[0].shape
    unused = pages
    # In a decode step its launch overlaps the end of the write.
    overlap = newest_slots and compute_capability(pages) >= 9
    _seal[(len(pages), kv_heads)](
        pages, unused if starts is None else starts, *rows, unused if block_table is None else block_table, *records,
        *(low or records[:2]), *parameters, HOT=block_table is not None, DECODE=newest_slots, OVERLAP=overlap, Hkv=kv_heads, D=dim,
        REFINED=low is not None, num_warps=4, enable_fp_fusion=False, launch_pdl=overlap,
    )  # fmt: skip
