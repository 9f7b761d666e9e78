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
    def bytes_per_token_head(self) -> int:
        return self.k_code_bytes + self.v_code_bytes + SCALE_BYTES * self.scale_count

    def bits_per_element(self, head_dim: int) -> float:
        """Mean bits of one K or V element, scales included."""
        return 8 * self.bytes_per_token_head / (2 * head_dim)
