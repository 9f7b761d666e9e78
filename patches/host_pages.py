"""What the host knows about tensors of slots travels with them, so that nobody has to read it back from the device.

SGLang hands the same tensor objects on: an allocation becomes a forward's `out_cache_loc`, a tree node's value is what is freed, a
match becomes a request's `prefix_indices`. A tensor that was cut or joined on the way carries no note, and its reader falls back to
the device.
"""

import numpy as np
import torch

from oscar_radix.geometry import PAGE_TOKENS

_PAGES = "oscar_pages"
_NEW_PAGES = "oscar_new_pages"
_ROWS = "oscar_rows"
_PREFIXES = "oscar_prefixes"


def note_pages(slots: torch.Tensor, pages: np.ndarray) -> None:
    """Note on page-aligned `slots` which pages (int64 [N]) they are."""
    setattr(slots, _PAGES, pages)


def noted_pages(slots: torch.Tensor) -> np.ndarray | None:
    """The pages noted on `slots`; None when there is no note."""
    return getattr(slots, _PAGES, None)


def note_new_pages(slots: torch.Tensor, pages: np.ndarray) -> torch.Tensor:
    """Note on the slots of a forward's new tokens the pages (int64 [N], in batch order) that were taken for them."""
    setattr(slots, _NEW_PAGES, pages)
    return slots


def noted_new_pages(slots: torch.Tensor) -> np.ndarray | None:
    """The pages taken for `slots`; None when there is no note."""
    return getattr(slots, _NEW_PAGES, None)


def pages_of(slots: torch.Tensor) -> np.ndarray:
    """Pages of page-aligned slots, in order, int64 [N]: as noted, else read from the device (and noted)."""
    pages = noted_pages(slots)
    if pages is None:
        pages = read_pages(slots[::PAGE_TOKENS])
        note_pages(slots, pages)
    return pages


def read_pages(slots: torch.Tensor) -> np.ndarray:
    """Pages of slots, read from the device: int64, of the shape of `slots`."""
    return (slots // PAGE_TOKENS).cpu().numpy().astype(np.int64)


def note_requests(slots: torch.Tensor, rows: np.ndarray, prefixes: list[np.ndarray | None]) -> None:
    """Note on a forward's slots the rows of its requests (int64 [B]) and the pages of their matched prefixes, where known."""
    setattr(slots, _ROWS, rows)
    setattr(slots, _PREFIXES, prefixes)


def noted_requests(slots: torch.Tensor) -> tuple[np.ndarray, list[np.ndarray | None]] | None:
    """What `note_requests` noted; None when there is no note."""
    rows = getattr(slots, _ROWS, None)
    return None if rows is None else (rows, getattr(slots, _PREFIXES))
