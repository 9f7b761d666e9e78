"""Merge the parts of the keys of an extend by their log-sum-exp."""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["splits", "total_rows"])
def _merge_parts(
    partial_ptr, lse_ptr, mean_ptr, out_ptr, final_lse_ptr, splits, total_rows,
    Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, KEEP_LSE: tl.constexpr,
):  # fmt: skip
    """Merge the parts of one query row; still in the value basis, V's mean added."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, D)
    part = tl.arange(0, S)
    lse = tl.load(lse_ptr + part * total_rows + row, mask=part < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - top)
    total = tl.sum(weights, 0)
    at = (part.to(tl.int64) * total_rows + row)[:, None] * D + channel[None, :]
    # An empty part wrote no output: its weight is 0 and it is not read.
    parts = tl.load(partial_ptr + at, mask=((part < splits) & (weights > 0))[:, None], other=0.0)
    out = tl.sum(parts * (weights / total)[:, None], 0) + tl.load(mean_ptr + (row % Hq) // G * D + channel)
    tl.store(out_ptr + row * D + channel, out.to(out_ptr.dtype.element_ty))
    if KEEP_LSE:
        tl.store(final_lse_ptr + row, (top + tl.log2(total)) * 0.6931471805599453)


def merge_parts(
    partial: torch.Tensor, lse: torch.Tensor, value_mean: torch.Tensor, out: torch.Tensor, final_lse: torch.Tensor | None = None
) -> None:
    """Attention of all parts, plus V's mean.

    Args:
        partial: float32 [S, T, Hq, D] in the value basis.
        lse: float32 [S, T, Hq], in units of log 2; -inf for a part without keys, whose output is not read.
        value_mean: float32 [Hkv, D].
        out: [T, Hq, D], any float dtype; written.
        final_lse: float32 [T, Hq], natural logarithm; written where it is given.
    """
    splits, tokens, query_heads, dim = partial.shape
    kept = value_mean if final_lse is None else final_lse
    _merge_parts[(tokens * query_heads,)](
        partial, lse, value_mean, out, kept, splits, tokens * query_heads, Hq=query_heads, G=query_heads // len(value_mean), D=dim,
        S=triton.next_power_of_2(splits), KEEP_LSE=final_lse is not None, num_warps=1,
    )  # fmt: skip
