"""SGLang's paged allocator with its free list on the host, and page owners kept by the store."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.patches.host_pages import note_new_pages, noted_pages, read_pages
from oscar_radix.pool.free_list import FreeList
from oscar_radix.pool.slots import decode_slots, extend_slots, pages_for_extend
from oscar_radix.pool.store import KVStore
from oscar_radix.pool.upload import upload


class OscarPageAllocator(PagedTokenToKVPoolAllocator):
    """Hands out and takes back the pages that SGLang's would, in the same order, without asking the device which they are.

    `free_pages` is made from the host's list when somebody reads it (SGLang's leak checks do). Slots that it returns carry the note
    of their new pages. Freed slots carry one when they are a tree node's; those of a request lie between `freeing_row`.
    """

    def __init__(self, store: KVStore, size: int, dtype: torch.dtype, device: str, kvcache: Any):
        self.store = store
        self._free = FreeList(np.zeros(0, dtype=np.int64))
        self._row: np.ndarray | None = None
        self._freed_in_group: list[np.ndarray] = []
        super().__init__(size, PAGE_TOKENS, dtype, device, kvcache, need_sort=False)

    # Free list -------------------------------------------------------------------------------------------------------

    @property
    def free_pages(self) -> torch.Tensor:
        """SGLang's free list: int64 on the device, the first to go first."""
        return torch.from_numpy(self._free.numbers).to(self.device)

    @free_pages.setter
    def free_pages(self, pages: torch.Tensor | None) -> None:
        self._free = FreeList(np.zeros(0, dtype=np.int64) if pages is None else pages.cpu().numpy())

    @property
    def free_page_numbers(self) -> np.ndarray:
        """`free_pages` on the host: int64."""
        return self._free.numbers

    def available_size(self) -> int:
        """Tokens of the free pages."""
        return len(self._free) * PAGE_TOKENS

    # Allocate --------------------------------------------------------------------------------------------------------

    def alloc(self, need_size: int) -> torch.Tensor | None:
        """Whole pages, as slots."""
        pages = self._take(-(-need_size // PAGE_TOKENS))
        if pages is None:
            return None
        return upload((pages[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).reshape(-1), torch.device(self.device))

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
        if pages is None:
            return None
        new_pages = upload(pages, torch.device(self.device))
        return note_new_pages(extend_slots(prefix_lens, seq_lens, last_loc, new_pages, extend_num_tokens), pages)

    def alloc_decode(self, seq_lens: torch.Tensor, seq_lens_cpu: torch.Tensor, last_loc: torch.Tensor) -> torch.Tensor | None:
        """One slot for each sequence, its new token included in seq_lens, or None when too few pages are free."""
        pages = self._take(pages_for_extend(seq_lens_cpu - 1, seq_lens_cpu))
        if pages is None:
            return None
        new_pages = upload(pages, torch.device(self.device)) if len(pages) else torch.empty(0, dtype=torch.int64, device=self.device)
        return note_new_pages(decode_slots(seq_lens, last_loc, new_pages), pages)

    def _take(self, count: int) -> np.ndarray | None:
        if count > len(self._free):
            return None
        pages = self._free.take(count)
        self.store.allocate(pages)
        return pages

    # Free ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def freeing_row(self, pages: np.ndarray | None) -> Iterator[None]:
        """Segments freed in here are of the request with these pages (int64 [N]); None when the host does not know them."""
        self._row = pages
        try:
            yield
        finally:
            self._row = None

    def free_segment(self, free_index: torch.Tensor, *, start_pos: int) -> None:
        """Free slots [start_pos, start_pos + N) of a request's row, or those of a tree node (then start_pos is 0)."""
        count, offset = free_index.numel(), start_pos % PAGE_TOKENS
        if not count:
            return
        pages = noted_pages(free_index)
        if pages is None and self._row is not None:
            pages = self._row[start_pos // PAGE_TOKENS : -(-(start_pos + count) // PAGE_TOKENS)]
        elif pages is None:
            next_page = -offset % PAGE_TOKENS
            pages = read_pages(torch.cat([free_index[: 1 if offset else 0], free_index[next_page::PAGE_TOKENS]]))
        if self.is_not_in_free_group:
            self._give_back(pages)
        else:
            self._freed_in_group.append(pages)

    def free_group_begin(self) -> None:
        """From here on frees are put off until the end of the group."""
        super().free_group_begin()
        self._freed_in_group = []

    def free_group_end(self) -> None:
        """Free everything that the group put off."""
        super().free_group_end()
        if self._freed_in_group:
            self._give_back(np.concatenate(self._freed_in_group))
            self._freed_in_group = []

    def _release_page_ids(self, *page_ids: torch.Tensor) -> None:
        self._give_back(torch.cat(page_ids).cpu().numpy())

    def _give_back(self, pages: np.ndarray) -> None:
        self.store.free(pages)
        self._free.give_back(pages)

    def clear(self) -> None:
        """Everything back to the free list, in ascending order."""
        self._free = FreeList(np.arange(1, self.num_pages + 1))
        self.release_pages = torch.empty(0, dtype=torch.int64, device=self.device)
        self.is_not_in_free_group = True
        self.free_group = []
        self.free_page_reps_group = []
        self._freed_in_group = []
        self.store.clear()
