"""Which pages of a forward's sequences have a mass slot, as the mass kernels take them."""

from dataclasses import dataclass

import numpy as np

from oscar_radix.geometry import PAGE_TOKENS

CHUNK_PAGES = 32
"""Pages that a program of a kernel reads at most."""


@dataclass(frozen=True)
class WatchedPages:
    """Sequence after sequence, each in order.

    entries: int32 [3, N], of each page its number, its slot, and its index in the sequence. chunks: int32 [3, C], of each up to CHUNK_PAGES
    entries of one sequence the sequence, the first entry, and the end.
    """

    entries: np.ndarray
    chunks: np.ndarray


def watched_pages(slots: np.ndarray, pages: np.ndarray, lengths: np.ndarray) -> WatchedPages:
    """All pages with a slot; page 0, which is padding, has none whatever `slots` says.

    Args:
        slots: int32 [pages], the slot of a page or -1.
        pages: int32 [B, C], page numbers of each sequence in order, anything beyond its end.
        lengths: int64 [B], tokens.
    """
    inside = np.arange(pages.shape[1]) < -(-lengths[:, None] // PAGE_TOKENS)
    sequence, index = np.nonzero(inside & (pages > 0) & (slots[np.where(inside, pages, 0)] >= 0))
    page = pages[sequence, index]
    entries = np.stack([page, slots[page], index]).astype(np.int32)
    counts = np.bincount(sequence, minlength=len(lengths))
    pieces = -(-counts // CHUNK_PAGES)
    owner = np.repeat(np.arange(len(lengths)), pieces)
    ends = np.cumsum(counts)[owner]
    first = ends - counts[owner] + CHUNK_PAGES * (np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces))
    chunks = np.stack([owner, first, np.minimum(first + CHUNK_PAGES, ends)]).astype(np.int32)
    return WatchedPages(entries, chunks)
