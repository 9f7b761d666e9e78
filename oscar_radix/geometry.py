"""The shape of a model's KV cache, as one rank sees it."""

from dataclasses import dataclass

PAGE_TOKENS = 32
"""Tokens (slots) of one page. Sealing, hot rows and radix nodes all work on whole pages of this size."""

SUPPORTED_HEAD_DIMS = (64, 128, 256)


@dataclass(frozen=True)
class Geometry:
    """Attention shape of one tensor-parallel rank: `query_heads` is a multiple of `kv_heads` (GQA)."""

    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        if self.head_dim not in SUPPORTED_HEAD_DIMS:
            raise ValueError(f"head_dim {self.head_dim} is not supported; supported: {SUPPORTED_HEAD_DIMS}")
        if self.query_heads % self.kv_heads:
            raise ValueError(f"{self.query_heads} query heads cannot be shared by {self.kv_heads} KV heads evenly")

    @property
    def group(self) -> int:
        """Query heads per KV head (the GQA group)."""
        return self.query_heads // self.kv_heads

    @property
    def kv_elements_per_token(self) -> int:
        """K and V elements of one token over all layers."""
        return self.layers * self.kv_heads * self.head_dim * 2
