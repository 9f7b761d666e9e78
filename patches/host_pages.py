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
