"""The hot pool: a bounded cache of int8 rows over the 2-bit base."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from oscar_radix.geometry import PAGE_TOKENS, Geometry
from oscar_radix.kernels.keep_rows import keep_rows
from oscar_radix.pool.free_list import FreeList
from oscar_radix.pool.one_owner import check_one_owner
from oscar_radix.pool.upload import upload, upload_all

BLOCK_ROWS = 2
"""int8 rows of K and of V per (layer, KV head) in one hot block."""

PAGE_BLOCKS = PAGE_TOKENS // BLOCK_ROWS
"""Blocks of a page at level 32."""


@dataclass(frozen=True)
class Rows:
    """int8 rows of one layer: k, v int8 [..., D]; k_scale, v_scale fp16 [...]; the leading axes are the same in all four."""

    k: torch.Tensor
    k_scale: torch.Tensor
    v: torch.Tensor
    v_scale: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> "Rows":
        return Rows(self.k[index], self.k_scale[index], self.v[index], self.v_scale[index])


class HotPool:
    """Blocks of 2 int8 rows, each block with one owner: the free list or a page.

    A block holds, for every (layer, KV head), two rows of K and V in the codec's basis, their fp16 scales and the numbers
    of the tokens (0..31 of the page) that they are. A page at level r owns r / 2 blocks, listed in its row of the block
    table; at level 32 block i holds tokens 2i and 2i + 1. Bit i of row_masks[layer, page, head] says that token i is hot.

    Args:
        geometry: attention shape of this rank.
        pages: number of pages that the block table covers, page 0 included.
        blocks: number of hot blocks.
        device: where the buffers live.
    """

    def __init__(self, geometry: Geometry, pages: int, blocks: int, device: torch.device | str):
        if blocks < PAGE_BLOCKS:
            raise ValueError(f"the hot pool holds {blocks} blocks; one fresh page takes {PAGE_BLOCKS}")
        shape = (geometry.layers, blocks, geometry.kv_heads, BLOCK_ROWS)
        self.device = torch.device(device)
        self.capacity = blocks
        self.k_rows = torch.zeros(*shape, geometry.head_dim, dtype=torch.int8, device=device)
        self.v_rows = torch.zeros(*shape, geometry.head_dim, dtype=torch.int8, device=device)
        self.scales = torch.zeros(*shape, 2, dtype=torch.float16, device=device)
        self.row_numbers = torch.zeros(*shape, dtype=torch.uint8, device=device)
        self.row_masks = torch.zeros(geometry.layers, pages, geometry.kv_heads, dtype=torch.int32, device=device)
        self.block_table = np.full((pages, PAGE_BLOCKS), -1, dtype=np.int32)
        self.levels = np.zeros(pages, dtype=np.uint8)
        # On a CPU the kernels' tables are the host's; elsewhere they are copies, brought up to date by `sync_tables`.
        self.device_block_table = torch.from_numpy(self.block_table).to(device)
        self.device_levels = torch.from_numpy(self.levels).to(device)
        self.before_moving_rows: Callable[[np.ndarray], None] = lambda pages: None
        """Told pages (int64 [N]) whose rows are about to change places within their blocks."""
        self.free = FreeList(np.arange(blocks))
        self._changed = np.zeros(pages, dtype=bool)
        self._acquired = np.zeros(pages, dtype=bool)

    # Ownership -------------------------------------------------------------------------------------------------------

    @property
    def free_blocks(self) -> int:
        """Blocks that no page owns."""
        return len(self.free)

    def acquire(self, page: int) -> bool:
        """Give `page` the blocks of a whole page (level 32). False, and nothing changes, when too few are free."""
        if self.levels[page]:
            raise RuntimeError(f"page {page} already holds {self.levels[page]} hot rows")
        if len(self.free) < PAGE_BLOCKS:
            return False
        self.block_table[page] = self.free.take(PAGE_BLOCKS)
        self.levels[page] = PAGE_TOKENS
        self._changed[page] = self._acquired[page] = True
        return True

    def release(self, pages: np.ndarray | int) -> None:
        """Drop all hot rows of `pages` (int64 [N], distinct, or one page); their base records are what remains."""
        held = self.block_table[pages]
        self.free.give_back(held[held >= 0])
        self.block_table[pages] = -1
        self.levels[pages] = 0
        self._changed[pages] = True

    def shrink(self, pages: np.ndarray, level: int, scores: torch.Tensor) -> None:
        """Keep the `level` rows of largest score of each page, per (layer, head), and free the other blocks.

        Args:
            pages: int64 [N], distinct, each at a level above `level`.
            level: even, above 0.
            scores: float32 [N, layers, Hkv, 32] on the pool's device, by token number; ties go to the lower number, NaN is lowest.

        Raises:
            RuntimeError: naming the first page that does not hold more than `level` rows; nothing has changed then.
        """
        kept = level // BLOCK_ROWS
        wrong = pages[(self.levels[pages] <= level) | (level <= 0) | (level % BLOCK_ROWS != 0)]
        if len(wrong):
            raise RuntimeError(f"page {wrong[0]} is at level {self.levels[wrong[0]]}; cannot keep {level} of its rows")
        self.before_moving_rows(pages)
        if self._acquired[pages].any():
            self.sync_tables()  # their rows get their numbers
        index, blocks = upload_all([pages, self.block_table[pages]], self.device)
        hot = (self.k_rows, self.v_rows, self.scales, self.row_numbers)
        if self.device.type == "cpu":
            lower = keep_rows
        else:
            from oscar_radix.kernels.levels import keep_rows_kernel as lower  # Triton is needed on GPUs only
        lower(hot, self.row_masks, index, blocks, scores.contiguous(), level)
        freed = self.block_table[pages, kept:]
        self.free.give_back(freed[freed >= 0])
        self.block_table[pages, kept:] = -1
        self.levels[pages] = level
        self._changed[pages] = True

    def move(self, source: int, target: int) -> None:
        """Hand the blocks of page `source` to page `target`, which holds none; `source` is left at level 0."""
        if self.levels[target]:
            raise RuntimeError(f"page {target} already holds {self.levels[target]} hot rows; cannot take those of page {source}")
        if self.levels[source] != PAGE_TOKENS:
            # A whole page's mask comes with the tables: a forward that runs now may still read the target by its old one.
            self.row_masks[:, target] = self.row_masks[:, source]
        self.block_table[target] = self.block_table[source]
        self.levels[target] = self.levels[source]
        self.block_table[source] = -1
        self.levels[source] = 0
        self._changed[[source, target]] = True
        self._acquired[target] |= self._acquired[source]

    def clear(self) -> None:
        """All blocks back to the free list."""
        self.block_table.fill(-1)
        self.levels.fill(0)
        self.free = FreeList(np.arange(self.capacity))
        self.device_block_table.fill_(-1)
        self.device_levels.fill_(0)
        self.row_masks.zero_()
        self._changed.fill(False)
        self._acquired.fill(False)

    def sync_tables(self) -> None:
        """Bring masks, row numbers of whole pages and the device's tables up to date, in order with the kernels of the current stream.

        `shrink` writes its masks and row numbers itself.
        """
        pages = np.flatnonzero(self._changed)
        if not len(pages):
            return
        levels = self.levels[pages]
        masked = (levels == 0) | (levels == PAGE_TOKENS)
        fresh = np.flatnonzero(self._acquired & (self.levels == PAGE_TOKENS))
        arrays = [
            pages[masked],
            -(levels[masked] == PAGE_TOKENS).astype(np.int32),
            self.block_table[fresh].reshape(-1).astype(np.int64),
            np.tile(np.arange(PAGE_TOKENS, dtype=np.uint8), len(fresh)),
            pages,
            self.block_table[pages],
            levels,
        ]
        masked_pages, masks, fresh_blocks, numbers, index, blocks, new_levels = upload_all(arrays, self.device)
        self.row_masks[:, masked_pages] = masks[:, None]
        if len(fresh):
            self.row_numbers[:, fresh_blocks] = numbers.view(-1, 1, BLOCK_ROWS)
        if self.device.type != "cpu":
            self.device_block_table[index] = blocks
            self.device_levels[index] = new_levels
        self._changed.fill(False)
        self._acquired.fill(False)

    # Data ------------------------------------------------------------------------------------------------------------

    def blocks_of(self, pages: np.ndarray, level: int) -> torch.Tensor:
        """Block numbers of pages at the same level: int64 [N, level / 2] on the device."""
        return upload(self.block_numbers(pages, level), self.device)

    def block_numbers(self, pages: np.ndarray, level: int) -> np.ndarray:
        """`blocks_of` on the host."""
        return self.block_table[pages, : level // BLOCK_ROWS].astype(np.int64)

    def write(self, layer: int, blocks: torch.Tensor, places: torch.Tensor, rows: Rows) -> None:
        """Store T rows ([T, Hkv, ...]) at `blocks` and `places` (0 or 1 in the block), int64 [T]."""
        self.k_rows[layer, blocks, :, places] = rows.k
        self.v_rows[layer, blocks, :, places] = rows.v
        self.scales[layer, blocks, :, places, 0] = rows.k_scale
        self.scales[layer, blocks, :, places, 1] = rows.v_scale

    def read(self, layer: int, blocks: torch.Tensor) -> Rows:
        """Rows of N pages at one level r, in the order of their blocks.

        Args:
            layer: layer index.
            blocks: int64 [N, r / 2].

        Returns:
            Rows of shape [N, Hkv, r, ...].
        """
        pages, per_page = blocks.shape
        heads, dim = self.k_rows.shape[2], self.k_rows.shape[4]
        flat = blocks.reshape(-1)

        def gather(buffer: torch.Tensor, width: int) -> torch.Tensor:
            rows = buffer[layer, flat].view(pages, per_page, heads, BLOCK_ROWS, width)
            return rows.transpose(1, 2).reshape(pages, heads, per_page * BLOCK_ROWS, width)

        scales = gather(self.scales, 2)
        return Rows(gather(self.k_rows, dim), scales[..., 0], gather(self.v_rows, dim), scales[..., 1])

    # Bytes -----------------------------------------------------------------------------------------------------------

    @staticmethod
    def block_bytes(geometry: Geometry) -> int:
        """Bytes of one block over all layers and KV heads: rows, scales, row numbers."""
        row = 2 * geometry.head_dim + 2 * 2 + 1
        return geometry.layers * geometry.kv_heads * BLOCK_ROWS * row

    @staticmethod
    def table_bytes_per_page(geometry: Geometry) -> int:
        """Bytes of a page's entry in the block table, the level table and the row masks."""
        return PAGE_BLOCKS * 4 + 1 + geometry.layers * geometry.kv_heads * 4

    @property
    def row_bytes(self) -> int:
        """Bytes of all rows, their scales and row numbers."""
        return self.k_rows.nbytes + self.v_rows.nbytes + self.scales.nbytes + self.row_numbers.nbytes

    @property
    def table_bytes(self) -> int:
        """Bytes of block table, level table and row masks: the device's, which on a CPU are the host's."""
        return self.device_block_table.nbytes + self.device_levels.nbytes + self.row_masks.nbytes

    def check_integrity(self) -> None:
        """Every block is owned exactly once, and every page's block count is what its level says."""
        check_one_owner(self.free.numbers, self.block_table[self.block_table >= 0], self.capacity, "hot blocks")
        counts = (self.block_table >= 0).sum(axis=1)
        if not (counts * BLOCK_ROWS == self.levels).all():
            page = int(np.flatnonzero(counts * BLOCK_ROWS != self.levels)[0])
            raise RuntimeError(f"page {page} is at level {self.levels[page]} but owns {counts[page]} hot blocks")
