"""Effective bits of a prefix, counted from bytes as the store lays them out."""

from oscar_radix.codec.layout import SCALE_BYTES, RecordLayout
from oscar_radix.geometry import PAGE_TOKENS

MASK_BYTES = 4
"""Row mask of a (layer, page, KV head), held by every page."""
ROW_NUMBER_BYTES = 1


def row_bytes(head_dim: int, row_bits: int) -> int:
    """Bytes of one hot row of one KV head: K, V, a scale for each, and the number of the token that it is."""
    return 2 * head_dim * row_bits // 8 + 2 * SCALE_BYTES + ROW_NUMBER_BYTES


def record_bytes(layout: RecordLayout, head_dim: int, key_bits: float | None = None, refined: float = 0.0) -> float:
    """Bytes of a record of one token and KV head, mean over layers; `key_bits` instead of 2 for K; refined: share of the layers."""
    return layout.bytes_per_token_head + refined * layout.code_bytes + (0 if key_bits is None else (key_bits - 2) * head_dim / 8)


def effective_bits(record: float, head_dim: int, hot_share: float, row_bits: int) -> float:
    """Bits per K or V element of tokens of which a share has a hot row on top of its record; masks included.

    Mass tables (4 bytes a token and head, of tracked pages only), block tables and codec parameters are not.
    """
    per_token = record + MASK_BYTES / PAGE_TOKENS + hot_share * row_bytes(head_dim, row_bits)
    return 8 * per_token / (2 * head_dim)
