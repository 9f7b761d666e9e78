"""The base: one 2-bit record for every page, written once when the page is sealed."""

import torch

from oscar_radix.codec.layout import RecordLayout
from oscar_radix.geometry import PAGE_TOKENS, Geometry


class BaseRecords:
    """2-bit codes and their fp16 scales, laid out `[layer][page][kv head][token][bytes]`; no byte is shared by two tokens.

    Refined layers have as many bytes of low bits in arrays of their own, `[place][page][kv head][token][bytes]`.

    Args:
        geometry: attention shape of this rank.
        layout: bytes of one (token, KV head).
        pages: number of page records, page 0 (padding) included.
        device: where the buffers live.
        refined: number of refined layers.
    """

    def __init__(self, geometry: Geometry, layout: RecordLayout, pages: int, device: torch.device | str, refined: int = 0):
        rows = (pages, geometry.kv_heads, PAGE_TOKENS)
        codes = lambda layers, size: torch.zeros(layers, *rows, size, dtype=torch.uint8, device=device)  # noqa: E731
        self.k_codes, self.v_codes = codes(geometry.layers, layout.k_code_bytes), codes(geometry.layers, layout.v_code_bytes)
        self.k_low, self.v_low = codes(refined, layout.k_code_bytes), codes(refined, layout.v_code_bytes)
        self.scales = torch.zeros(geometry.layers, *rows, layout.scale_count, dtype=torch.float16, device=device)

    def write(
        self, layer: int, pages: torch.Tensor, k_codes: torch.Tensor, v_codes: torch.Tensor, scales: torch.Tensor, place: int | None = None
    ) -> None:
        """Store the records of `pages` (int64 [N]); tensors are [N, Hkv, 32, bytes or scales], `place` that of a refined layer."""
        for codes, high, low in ((k_codes, self.k_codes, self.k_low), (v_codes, self.v_codes, self.v_low)):
            high[layer, pages] = codes[..., : high.shape[-1]]
            if place is not None:
                low[place, pages] = codes[..., high.shape[-1] :]
        self.scales[layer, pages] = scales

    def read(self, layer: int, pages: torch.Tensor, place: int | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Records of `pages` (int64 [N]): k_codes, v_codes, scales, each [N, Hkv, 32, ...], as `Codec.open` takes them."""
        k_codes, v_codes = self.k_codes[layer, pages], self.v_codes[layer, pages]
        if place is not None:
            k_codes = torch.cat((k_codes, self.k_low[place, pages]), -1)
            v_codes = torch.cat((v_codes, self.v_low[place, pages]), -1)
        return k_codes, v_codes, self.scales[layer, pages]

    @property
    def code_bytes(self) -> int:
        """Bytes of all codes."""
        return sum(codes.nbytes for codes in (self.k_codes, self.v_codes, self.k_low, self.v_low))

    @property
    def scale_bytes(self) -> int:
        """Bytes of all scales."""
        return self.scales.nbytes

    @staticmethod
    def page_bytes(geometry: Geometry, layout: RecordLayout, refined: int = 0) -> int:
        """Bytes of one page's record over all layers, `refined` of them refined, and KV heads."""
        return geometry.kv_heads * PAGE_TOKENS * (geometry.layers * layout.bytes_per_token_head + refined * layout.code_bytes)
