"""Leave the value basis after prefill attention, where the output projection does not: out = o R^T + mu.

Specification: `Codec.output_from_basis`.
"""

import torch
import triton
import triton.language as tl

ROWS = 64
"""Tokens of a program."""


@triton.jit(do_not_specialize=["tokens"])
def _leave_basis(o_ptr, rotation_ptr, mean_ptr, out_ptr, tokens, Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr):
    """out = o R^T + mu of M tokens of one query head."""
    token = tl.program_id(0) * M + tl.arange(0, M)
    query_head = tl.program_id(1)
    head = query_head // G
    channel = tl.arange(0, D)
    at = (token.to(tl.int64) * Hq + query_head)[:, None] * D + channel[None, :]
    inside = (token < tokens)[:, None]
    o = tl.load(o_ptr + at, mask=inside, other=0.0)
    # R^T [c, e] = R[e, c]
    rotation = tl.load(rotation_ptr + head * D * D + channel[None, :] * D + channel[:, None]).to(tl.float16)
    out = tl.dot(o, rotation) + tl.load(mean_ptr + head * D + channel)[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def leave_basis(o: torch.Tensor, rotation: torch.Tensor, mean: torch.Tensor, out: torch.Tensor) -> None:
    """out = o R^T + mu for prefill outputs.

    Args:
        o: fp16 [T, Hq, D] in the value basis, contiguous.
        rotation: float32 [Hkv, D, D]; mean: float32 [Hkv, D].
        out: [T, Hq, D], any float dtype, contiguous; written.
    """
    tokens, query_heads, dim = o.shape
    group = query_heads // rotation.shape[0]
    grid = (triton.cdiv(tokens, ROWS), query_heads)
    _leave_basis[grid](o, rotation, mean, out, tokens, Hq=query_heads, G=group, D=dim, M=ROWS, num_warps=4)
