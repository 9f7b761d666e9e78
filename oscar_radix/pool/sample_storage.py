"""Where the queries of sampled forwards are kept on a GPU: at fixed addresses, since CUDA graphs replay."""

from dataclasses import dataclass

import torch

from oscar_radix.geometry import Geometry

MOST_QUERIES, LEAST_QUERIES = 256, 16
"""Queries of one forward that are kept: of so many requests in a decode step, or so many over the requests of a prefill batch. The most
take 145 MiB at 36 layers of 32 heads of 128 channels."""

BUDGET_SHARE = 1 / 128
"""Of the KV bytes at most, unless that is less than LEAST_QUERIES take."""


@dataclass(frozen=True)
class SampleStorage:
    """query: float32 [layers, queries, Hq, D]; lse: float32 [layers, queries, Hq]."""

    query: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def empty(cls, geometry: Geometry, queries: int, device: torch.device | str) -> "SampleStorage":
        """Room for `queries` queries."""
        shape = (geometry.layers, queries, geometry.query_heads)
        query = torch.zeros(*shape, geometry.head_dim, dtype=torch.float32, device=device)
        return cls(query, torch.full(shape, float("inf"), dtype=torch.float32, device=device))

    @staticmethod
    def bytes_of(geometry: Geometry, queries: int) -> int:
        """Bytes of room for `queries` queries."""
        return geometry.layers * queries * geometry.query_heads * (geometry.head_dim + 1) * 4

    @staticmethod
    def queries_for(geometry: Geometry, budget_bytes: int) -> int:
        """How many there is room for in a KV budget."""
        affordable = int(budget_bytes * BUDGET_SHARE) // SampleStorage.bytes_of(geometry, 1)
        return min(MOST_QUERIES, max(LEAST_QUERIES, affordable))

    @property
    def queries(self) -> int:
        """How many there is room for."""
        return self.query.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.query.nbytes + self.lse.nbytes
