"""Sizes of a page's 2-bit record."""

from dataclasses import dataclass

SCALE_BYTES = 2


@dataclass(frozen=True)
class RecordLayout:
    """Bytes that one token of one KV head takes: K codes, V codes, and `scale_count` fp16 numbers.

    In memory a page is [page][KV head][token][bytes], K codes, V codes and scales each in their own array.
    """

    k_code_bytes: int
    v_code_bytes: int
    scale_count: int

    @property
    def code_bytes(self) -> int:
        """Of K and V: as many more are the low bits in a refined layer."""
        return self.k_code_bytes + self.v_code_bytes

    @property
    def bytes_per_token_head(self) -> int:
        return self.code_bytes + SCALE_BYTES * self.scale_count

    def bits_per_element(self, head_dim: int, refined_share: float = 0.0) -> float:
        """Mean bits of one K or V element, scales and the low bits of a share of the layers included."""
        return 8 * (self.bytes_per_token_head + refined_share * self.code_bytes) / (2 * head_dim)
