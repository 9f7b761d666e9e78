"""Which rows are hot: a policy's choice, from scores, at a granularity."""

import numpy as np
import torch
from torch import Tensor

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.policy.attention import AttentionPolicy
from oscar_radix.pool.hot_pool import BLOCK_ROWS

BUDGET_LEVELS = (0, 2, 4, 8, 16)
"""Hot rows a page that a budget of a layer, a head or a page may take."""

GRANULARITIES = (
    *("page", "prefix", "global", "layer-rows", "model-rows", "whole-pages"),
    *("layer-budget", "head-budget", "page-budget", "server"),
)


def choose(policy: str, scores: Tensor, rows: float, granularity: str = "page", seed: int = 0) -> Tensor:
    """Bool [L, H, C]: which of C tokens (a multiple of 32) have a hot row in each layer and KV head; rows / 32 of all of them.

    policy: `none`; `attention`: largest scores; `random`: as many of every page; `window`: the last tokens.
    """
    if policy == "none" or not rows:
        return torch.zeros_like(scores, dtype=torch.bool)
    if policy == "window":
        tokens = torch.arange(scores.shape[-1], device=scores.device)
        return (tokens >= scores.shape[-1] - scores.shape[-1] * rows // PAGE_TOKENS).expand_as(scores)
    if policy == "random":
        draw = torch.rand(scores.shape, generator=torch.Generator().manual_seed(seed)).to(scores.device)
        return _per_page(draw, torch.full((1, 1, 1), rows))
    return by_score(scores, rows, granularity)


def by_score(scores: Tensor, rows: float, granularity: str) -> Tensor:
    """The rows of largest score.

    page: `rows` of each page, per (layer, head). prefix: the same number per (layer, head), anywhere. global: anywhere in any layer
    and head. layer-rows, model-rows: as page, the same rows for all heads of a layer, or of the model. whole-pages: whole pages.
    layer-budget, head-budget, page-budget: a number of BUDGET_LEVELS rows for each page of a layer, of a (layer, head), or for
    all layers and heads of a page, by how much score each next level covers; `rows` on average. server: levels of pages, for all layers
    and heads, as policy `attention` decides them for pages that still hold 8 rows; `rows` on average.
    """
    tokens = scores.shape[-1]
    pages = scores.unflatten(-1, (-1, PAGE_TOKENS))
    if granularity == "page":
        return _per_page(scores, torch.full((1, 1, 1), rows))
    if granularity == "prefix":
        return _largest(scores, tokens * rows // PAGE_TOKENS)
    if granularity == "global":
        return _largest(scores.flatten(), scores.numel() * rows // PAGE_TOKENS).view_as(scores)
    if granularity in ("layer-rows", "model-rows"):
        shared = scores.mean(1, keepdim=True) if granularity == "layer-rows" else scores.mean((0, 1), keepdim=True)
        return _per_page(shared, torch.full((1, 1, 1), rows)).expand_as(scores)
    if granularity == "whole-pages":
        hot = _largest(pages.sum((0, 1, 3)), pages.shape[2] * rows // PAGE_TOKENS)
        return hot.repeat_interleave(PAGE_TOKENS).expand_as(scores)
    if granularity == "server":
        return _per_page(scores, _server_levels(pages, rows))
    axes = {"layer-budget": (1, 2), "head-budget": (2,), "page-budget": (0, 1)}
    if granularity not in axes:
        raise ValueError(f"there is no granularity '{granularity}'; granularities: {', '.join(GRANULARITIES)}")
    return _per_page(scores, budgets(pages, rows, axes[granularity]))


def _server_levels(pages: Tensor, rows: float) -> Tensor:
    """Levels int64 [pages] of pages [L, H, pages, 32]."""
    mass = pages.sum((0, 1, 3)).double().cpu().numpy()
    policy = AttentionPolicy()
    held = np.full(len(mass), policy.settle(np.arange(len(mass))))
    return torch.from_numpy(policy.levels(held, mass, int(len(mass) * rows) // BLOCK_ROWS))


def budgets(pages: Tensor, rows: float, shared: tuple[int, ...]) -> Tensor:
    """Rows of each page, `rows` on average at most, one number along the axes `shared` of [L, H, pages, 32]; int64, broadcastable."""
    covered = pages.sort(-1, descending=True).values.cumsum(-1)
    covered = torch.cat((torch.zeros_like(covered[..., :1]), covered), -1)[..., list(BUDGET_LEVELS)]
    covered = covered.sum(shared, keepdim=True)
    counts = torch.tensor(BUDGET_LEVELS).diff()
    gains = covered.diff(dim=-1).flatten(0, -2).cpu() / counts
    left = int(rows * len(gains))
    levels = torch.zeros(len(gains), dtype=torch.int64)
    for place in gains.flatten().argsort(descending=True, stable=True).tolist():
        unit, step = divmod(place, len(counts))
        # A step follows the one before it: sums of sorted scores are concave, so it never comes earlier.
        if levels[unit] == BUDGET_LEVELS[step] and counts[step] <= left:
            levels[unit] = BUDGET_LEVELS[step + 1]
            left -= int(counts[step])
    return levels.view(covered.shape[:-1]).to(pages.device)


def _per_page(scores: Tensor, rows: Tensor) -> Tensor:
    """The `rows` (int64, broadcastable to [L, H, pages]) largest of each page of scores [L, H, C]."""
    pages = scores.unflatten(-1, (-1, PAGE_TOKENS))
    rank = pages.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < rows.to(scores.device).unsqueeze(-1)).flatten(-2)


def _largest(scores: Tensor, count: int) -> Tensor:
    """The `count` largest along the last axis."""
    index = scores.topk(count, dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, index, True)
