"""A fitted recipe: every tensor that a codec needs, and where it came from."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from oscar_radix.geometry import Geometry


class CalibrationError(ValueError):
    """A calibration that cannot be made, read, or used for this model."""


@dataclass(frozen=True)
class Calibration:
    """`tensors`: name to tensor of shape [layers, KV heads, ...], enough to rebuild the codec of `recipe`.

    `report`: JSON-able figures kept for `oscar-radix inspect`, such as predicted errors per layer.
    """

    recipe: str
    geometry: Geometry
    tensors: dict[str, Tensor]
    tokens: int
    model_name: str = ""
    model_fingerprint: str = ""
    text_hash: str = ""
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = (self.geometry.layers, self.geometry.kv_heads)
        for name, tensor in self.tensors.items():
            if tuple(tensor.shape[:2]) != expected:
                raise CalibrationError(
                    f"tensor '{name}' has shape {tuple(tensor.shape)}; "
                    f"the geometry asks for {expected[0]} layers and {expected[1]} KV heads"
                )

    def shard(self, rank: int, size: int) -> "Calibration":
        """The part of tensor-parallel `rank` of `size`: its KV heads. With more ranks than KV heads, neighbours share a head."""
        heads, queries = self.geometry.kv_heads, self.geometry.query_heads
        if not 0 <= rank < size:
            raise CalibrationError(f"tensor-parallel rank {rank} does not exist among {size} ranks")
        if queries % size or (heads % size and size % heads):
            raise CalibrationError(f"{heads} KV heads and {queries} query heads cannot be split over {size} tensor-parallel ranks evenly")
        count = max(heads // size, 1)
        first = rank * heads // size
        geometry = replace(self.geometry, kv_heads=count, query_heads=queries // size)
        tensors = {name: t[:, first:first + count].contiguous() for name, t in self.tensors.items()}
        return replace(self, geometry=geometry, tensors=tensors)
