"""Keep the last queries of each sequence of a prefill batch, with the log-sum-exp of their attention, for a mass kernel that runs later.

One launch a layer. Specification: `MassSample.keep_rows` in plain torch (oscar_radix.attention.mass).
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _keep_queries(query_ptr, lse_ptr, rows_ptr, kept_query_ptr, kept_lse_ptr, factor, H: tl.constexpr, D: tl.constexpr):
    item = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = tl.load(rows_ptr + item)
    known = row >= 0
    channel = tl.arange(0, D)
    query = tl.load(query_ptr + (row * H + head) * D + channel, mask=known, other=0.0).to(tl.float32)
    tl.store(kept_query_ptr + (item * H + head) * D + channel, query * factor)
    tl.store(kept_lse_ptr + item * H + head, tl.load(lse_ptr + row * H + head, mask=known, other=float("inf")))


def keep_queries(
    query: torch.Tensor, lse: torch.Tensor, rows: torch.Tensor, kept_query: torch.Tensor, kept_lse: torch.Tensor, factor: float
) -> None:
    """Copy rows of a batch to where a sample keeps them; everything contiguous.

    Args:
        query: fp16 or float32 [N, Hq, D], of all new tokens.
        lse: float32 [N, Hq], natural logarithm.
        rows: int64 [B, T]; -1: there is no such query, its log-sum-exp becomes inf and the query zero.
        kept_query: float32 [B, T, Hq, D], written: the queries times `factor`.
        kept_lse: float32 [B, T, Hq], written.
    """
    heads, dim = query.shape[1:]
    _keep_queries[(rows.numel(), heads)](query, lse, rows, kept_query, kept_lse, factor, H=heads, D=dim, num_warps=1)
