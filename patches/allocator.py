"""SGLang's paged allocator, with slot arithmetic in plain torch and page owners kept by the store."""

from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.slots import extend_slots, pages_for_extend
from oscar_radix.pool.store import KVStore


class OscarPageAllocator(PagedTokenToKVPoolAllocator):
    """The free list stays SGLang's (its leak checks read it); every page that leaves or enters it changes owner in the store."""

    def __init__(self, store: KVStore, size: int, dtype: torch.dtype, device: str, kvcache: Any):
        self.store = store
        super().__init__(size, PAGE_TOKENS, dtype, device, kvcache, need_sort=False)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Whole pages, as slots."""
        pages = self._take(-(-need_size // PAGE_TOKENS))
        if pages is None:
            return None
        return (pages[:, None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS, device=self.device)).reshape(-1)

    def alloc_extend(
        self,
        prefix_lens: torch.Tensor,
        prefix_lens_cpu: torch.Tensor,
        seq_lens: torch.Tensor,
        seq_lens_cpu: torch.Tensor,
        last_loc: torch.Tensor,
        extend_num_tokens: int,
        num_new_pages: int | None = None,
    ) -> torch.Tensor | None:
        """Slots of the new tokens [extend_num_tokens], or None when too few pages are free."""
        pages = self._take(pages_for_extend(prefix_lens_cpu, seq_lens_cpu))
        return None if pages is None else extend_slots(prefix_lens, seq_lens, last_loc, pages)

    def alloc_decode(self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor) -> torch.Tensor | None:
        """One slot for each sequence, its new token included in seq_lens, or None when too few pages are free."""
        pages = self._take(pages_for_extend(seq_lens_cpu - 1, seq_lens_cpu))
        return None if pages is None else extend_slots(seq_lens - 1, seq_lens, last_loc, pages)

    def _take(self, count: int) -> torch.Tensor | None:
        if count > len(self.free_pages):
            return None
        pages = self.free_pages[:count]
        self.store.allocate(pages.cpu().numpy())
        self.free_pages = self.free_pages[count:]
        return pages

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        for pages in page_ids:
            self.store.free(pages.cpu().numpy())
        super()._release_page_ids(*page_ids)

    def clear(self) -> None:
        """Everything back to the free list."""
        super().clear()
        self.store.clear()
