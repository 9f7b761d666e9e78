"""The base: one 2-bit record for every page, written once when the page is sealed."""

import torch

from oscar_radix.codec.layout import RecordLayout
from oscar_radix.geometry import PAGE_TOKENS, Geometry


class BaseRecords:
    """2-bit codes and their fp16 scales, laid out `[layer][page][kv head][token][bytes]`; no byte is shared by two tokens.

    Args:
        geometry: attention shape of this rank.
        layout: bytes of one (token, KV head).
        pages: number of page records, page 0 (padding) included.
        device: where the buffers live.
    """

    def __init__(self, geometry: Geometry, layout: RecordLayout, pages: int, device: torch.device | str):
        shape = (geometry.layers, pages, geometry.kv_heads, PAGE_TOKENS)
        self.k_codes = torch.zeros(*shape, layout.k_code_bytes, dtype=torch.uint8, device=device)
        self.v_codes = torch.zeros(*shape, layout.v_code_bytes, dtype=torch.uint8, device=device)
        self.scales = torch.zeros(*shape, layout.scale_count, dtype=torch.float16, device=device)

    def write(self, layer: int, pages: torch.Tensor, k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Store the records of `pages` (int64 [N]); tensors are [N, Hkv, 32, bytes or scales]."""
        self.k_codes[layer, pages] = k_codes
        self.v_codes[layer, pages] = v_codes
        self.scales[layer, pages] = scales

    def read(self, layer: int, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Records of `pages` (int64 [N]): k_codes, v_codes, scales, each [N, Hkv, 32, ...]."""
        return self.k_codes[layer, pages], self.v_codes[layer, pages], self.scales[layer, pages]

    @property
    def code_bytes(self) -> int:
        """Bytes of all codes."""
        return self.k_codes.nbytes + self.v_codes.nbytes

    @property
    def scale_bytes(self) -> int:
        """Bytes of all scales."""
        return self.scales.nbytes

    @staticmethod
    def page_bytes(geometry: Geometry, layout: RecordLayout) -> int:
        """Bytes of one page's record over all layers and KV heads."""
        return geometry.layers * geometry.kv_heads * PAGE_TOKENS * layout.bytes_per_token_head
