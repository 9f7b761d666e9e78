"""The host store: int8 copies of whole sealed pages in host memory, from which hot rows come back."""

import contextlib

import numpy as np
import torch

from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.pool.free_list import FreeList
from oscar_radix.pool.hot_pool import BLOCK_ROWS, PAGE_BLOCKS, HotPool
from oscar_radix.pool.one_owner import check_one_owner
from oscar_radix.pool.upload import upload

PAGES_AT_ONCE = 8
"""Pages that pass through device memory in one piece: 18 MiB at 36 layers of 8 heads of 128, and three times that on the way out."""


class HostStore:
    """Copies of pages, one slot each; a slot is free or one page's. The copy that was read or written least recently gives way first.

    A copy is bit by bit what the page's hot blocks held at level 32: first k rows int8 [16, layers, Hkv, 2, D], then v rows, then scales
    fp16 [16, layers, Hkv, 2, 2]. On a GPU the memory is pinned, copies are made on a stream of their own, and pages come back on the
    current one: `copy` waits for what the current stream was given before, `restore` for all copies, `fence` makes the current stream
    wait for them. Whoever takes blocks away from a page after `copy` calls `fence` before they are written again.

    Args:
        hot: the pool whose pages are copied.
        geometry: attention shape of this rank.
        pages: page numbers, page 0 included.
        slots: pages that can be held at a time.
    """

    def __init__(self, hot: HotPool, geometry: Geometry, pages: int, slots: int):
        if slots < 1:
            raise ValueError(f"a host store needs room for a page at least, not for {slots}")
        self.hot = hot
        self.capacity = slots
        self.slots = np.full(pages, -1, dtype=np.int32)
        self.copied = self.dropped = 0
        """Copies made, and copies that gave way to others."""
        self.free = FreeList(np.arange(slots))
        self._used = np.zeros(slots, dtype=np.int64)
        self._depth = np.zeros(slots, dtype=np.int32)
        self._rows = torch.empty(slots, self.page_bytes(geometry), dtype=torch.uint8)
        self._stream = torch.cuda.Stream(hot.device) if hot.device.type == "cuda" else None
        self._last: torch.cuda.Event | None = None
        if self._stream:
            _pin(self._rows)

    # Ownership -------------------------------------------------------------------------------------------------------

    @property
    def pages_held(self) -> int:
        """Pages that have a copy."""
        return self.capacity - len(self.free)

    def holds(self, pages: np.ndarray) -> np.ndarray:
        """bool [N]: the page has a copy."""
        return self.slots[pages] >= 0

    def touch(self, pages: np.ndarray, now: int) -> None:
        """These pages (int64 [N]) are read in forward `now`."""
        self._used[self.slots[pages[self.holds(pages)]]] = now

    def forget(self, pages: np.ndarray) -> None:
        """`pages` (int64 [N]) are freed, or their copies are not worth keeping."""
        held = pages[self.holds(pages)]
        self.free.give_back(self.slots[held])
        self.slots[held] = -1

    def move(self, source: int, target: int) -> None:
        """Pages of the same tokens: `target` takes the copy of `source` if it has none, else that copy is dropped."""
        if self.slots[target] >= 0:
            self.forget(np.array([source]))
        else:
            self.slots[target], self.slots[source] = self.slots[source], -1

    def clear(self) -> None:
        """All slots to the free list."""
        self.slots.fill(-1)
        self.free = FreeList(np.arange(self.capacity))

    # Data ------------------------------------------------------------------------------------------------------------

    def copy(self, pages: np.ndarray, position: np.ndarray, now: int) -> np.ndarray:
        """Start copies of those pages that have none; with more pages than slots, of the last ones.

        Args:
            pages: int64 [N], distinct, sealed and at level 32.
            position: int [N], their indices in their sequences: of pages that were read at the same time, the last ones give way first.
            now: count of the forward.

        Returns:
            int64 [M], pages that have lost theirs to them.
        """
        new = ~self.holds(pages)
        pages, position = pages[new][-self.capacity :], position[new][-self.capacity :]
        if not len(pages):
            return pages
        lost = self._make_room(len(pages))
        slots = self.free.take(len(pages))
        self.slots[pages], self._used[slots], self._depth[slots] = slots, now, position
        self.copied += len(pages)
        blocks = self.hot.block_numbers(pages, PAGE_TOKENS)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self.hot.device))
        with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
            for start in range(0, len(pages), PAGES_AT_ONCE):
                part = slice(start, start + PAGES_AT_ONCE)
                packed = self._gather(blocks[part])
                for first, last in _runs(slots[part]):
                    self._rows[slots[start + first] : slots[start + last] + 1].copy_(packed[first : last + 1], non_blocking=True)
        if self._stream:
            self._last = self._stream.record_event()
        return lost

    def restore(self, pages: np.ndarray) -> None:
        """Write the copies of `pages` (int64 [N], at level 32) into their hot blocks, in order with the kernels of the current stream."""
        self.fence()
        slots, blocks = self.slots[pages], self.hot.block_numbers(pages, PAGE_TOKENS)
        for start in range(0, len(pages), PAGES_AT_ONCE):
            part = slots[start : start + PAGES_AT_ONCE]
            packed = torch.empty(len(part), self._rows.shape[1], dtype=torch.uint8, device=self.hot.device)
            for first, last in _runs(part):
                packed[first : last + 1].copy_(self._rows[part[first] : part[last] + 1], non_blocking=True)
            self._scatter(blocks[start : start + PAGES_AT_ONCE], packed)

    def fence(self) -> None:
        """The current stream waits for all copies."""
        if self._last:
            torch.cuda.current_stream(self.hot.device).wait_event(self._last)

    def _make_room(self, wanted: int) -> np.ndarray:
        holders = np.flatnonzero(self.slots >= 0)
        slots = self.slots[holders]
        order = np.lexsort((holders, -self._depth[slots], self._used[slots]))
        lost = holders[order[: max(0, wanted - len(self.free))]]
        self.forget(lost)
        self.dropped += len(lost)
        return lost

    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.hot.k_rows, self.hot.v_rows, self.hot.scales

    def _gather(self, blocks: np.ndarray) -> torch.Tensor:
        """Blocks of pages (int64 [N, 16]) as uint8 [N, page bytes] on the device."""
        index = upload(blocks.reshape(-1), self.hot.device)
        parts = [buffer.index_select(1, index).transpose(0, 1).reshape(len(blocks), -1).view(torch.uint8) for buffer in self._buffers()]
        return torch.cat(parts, dim=1)

    def _scatter(self, blocks: np.ndarray, packed: torch.Tensor) -> None:
        """The reverse of `_gather`."""
        index = upload(blocks.reshape(-1), self.hot.device)
        start = 0
        for buffer in self._buffers():
            layers, _, *block = buffer.shape
            size = buffer[:, 0].nbytes * PAGE_BLOCKS
            rows = packed[:, start : start + size].contiguous().view(buffer.dtype)
            buffer.index_copy_(1, index, rows.view(-1, layers, *block).transpose(0, 1))
            start += size

    # Bytes -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def page_bytes(geometry: Geometry) -> int:
        """Bytes of one copy: K and V rows and their scales, of all layers and KV heads."""
        return PAGE_BLOCKS * geometry.layers * geometry.kv_heads * BLOCK_ROWS * (2 * geometry.head_dim + 2 * 2)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return self._rows.nbytes

    def check_integrity(self) -> None:
        """Every slot is free or one page's.

        Raises:
            RuntimeError: naming the first slots that have not exactly one owner.
        """
        check_one_owner(self.free.numbers, self.slots[self.slots >= 0], self.capacity, "host slots")


def _pin(rows: torch.Tensor) -> None:
    """Lock a tensor's memory for transfers. torch's own pinned memory comes in powers of two."""
    error = int(torch.cuda.cudart().cudaHostRegister(rows.data_ptr(), rows.nbytes, 0))
    if error:
        raise RuntimeError(
            f"{rows.nbytes / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {error}): lower --oscar-host-gib, or raise the "
            f"limit on locked memory (ulimit -l)"
        )


def _runs(slots: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of each run of consecutive numbers: a run is one transfer."""
    breaks = np.flatnonzero(np.diff(slots) != 1)
    return list(zip([0, *(breaks + 1).tolist()], [*breaks.tolist(), len(slots) - 1], strict=True))
