"""Policy `random`: the control that spends the same bytes on rows that nobody asked for."""

import numpy as np
import torch

from oscar_radix.policy.base import Policy


class RandomPolicy(Policy):
    """Keeps 2 rows of each page per (layer, KV head), drawn uniformly.

    The generator is seeded by the number of draws so far, which is the same on every rank.
    """

    name = "random"
    level = 2

    def __init__(self) -> None:
        self._draws = 0

    def settle(self, pages: np.ndarray) -> int:
        return self.level

    def choose_rows(self, page: int, level: int, layers: int, kv_heads: int, page_tokens: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self._draws)
        self._draws += 1
        order = torch.rand(layers, kv_heads, page_tokens, generator=generator).argsort(dim=-1)
        return order[..., :level].sort(dim=-1).values
