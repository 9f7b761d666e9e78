"""Which pages the requests of a forward have: known on the host from what the allocator and the tree handed out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.patches.host_pages import noted_new_pages, noted_pages, read_pages
from oscar_radix.pool.request_pages import DecodeStep, RequestPages
from oscar_radix.pool.upload import upload
from oscar_radix.sequence import Sequence

NO_PAGES = np.zeros(0, dtype=np.int64)


def init_new(original: Callable[..., Any], cls: type, batch: Any, model_runner: Any, **kwargs: Any) -> Any:
    """AROUND ForwardBatch.init_new: tell our backend what only the scheduler's batch knows on the host."""
    forward = original(cls, batch, model_runner, **kwargs)
    pages = getattr(getattr(model_runner, "attn_backend", None), "pages", None)
    if isinstance(pages, ForwardPages):
        pages.announce(forward, batch)
    return forward


@dataclass(frozen=True)
class _Announced:
    """A forward that is about to run.

    slots, rids: its own objects; SGLang's eager runner keeps the list of ids and its graph runner the slots when they make views of it.
    rows: int64 [B], on the host. new_pages: those taken for it, in batch order, if known.
    prefixes: of a prefill, the pages of each matched prefix where known.
    """

    slots: torch.Tensor
    rids: list[str]
    rows: np.ndarray
    new_pages: np.ndarray | None
    prefixes: list[np.ndarray | None]


class ForwardPages:
    """Keeps `requests` up to date, forward by forward.

    A prefill begins a request's list (matched pages and new ones), a decode step adds the page that was taken for its token. Where a
    forward was not announced, a note is missing or a list is not as long as it should be, the row is read from the device, which is
    slower and is counted.

    Args:
        rows: SGLang's ReqToTokenPool.
        requests: the lists.
    """

    def __init__(self, rows: Any, requests: RequestPages):
        self.req_to_token: torch.Tensor = rows.req_to_token
        self.generation: np.ndarray = rows.req_generation.numpy()
        self.requests = requests
        self._announced: _Announced | None = None

    def announce(self, forward: Any, batch: Any) -> None:
        """A ForwardBatch that SGLang has just made of a ScheduleBatch."""
        rows, slots = batch.req_pool_indices_cpu, forward.out_cache_loc
        if rows is None or slots is None or len(rows) != forward.batch_size:
            self._announced = None
            return
        prefixes = [noted_pages(req.prefix_indices) for req in batch.reqs] if forward.forward_mode.is_extend() else []
        self._announced = _Announced(slots, forward.rids, rows.numpy(), noted_new_pages(slots), prefixes)

    def _lookup(self, forward: Any) -> _Announced | None:
        known = self._announced
        if known is not None and (forward.out_cache_loc is known.slots or getattr(forward, "rids", None) is known.rids):
            return known
        return None

    def decode(self, forward: Any) -> DecodeStep:
        """The requests of a decode forward; padding rows of CUDA graphs (one token) are left out."""
        lengths = forward.seq_lens_cpu.numpy().astype(np.int64)
        announced = self._lookup(forward)
        if announced is None:
            real = lengths > 1
            rows, lengths = forward.req_pool_indices.cpu().numpy().astype(np.int64)[real], lengths[real]
        else:
            rows = announced.rows
            lengths = lengths[: len(rows)]
        known = self.requests.known(rows, self.generation[rows], lengths - 1)
        begins = lengths % PAGE_TOKENS == 1
        if announced is None:
            known[:] = False
        elif announced.new_pages is None or len(announced.new_pages) != np.count_nonzero(begins):
            known &= ~begins
        else:
            self.requests.append(rows[begins & known], announced.new_pages[known[begins]])
        if not known.all():
            self.requests.decode_rows_read_back += self._read_back(rows[~known], lengths[~known])
        return DecodeStep(self.requests, rows, lengths)

    def extend(self, forward: Any) -> list[Sequence]:
        """The requests of a prefill forward."""
        lengths = forward.seq_lens_cpu.numpy().astype(np.int64)
        prefixes = np.array(forward.extend_prefix_lens_cpu, dtype=np.int64)
        announced = self._lookup(forward)
        rows = forward.req_pool_indices.cpu().numpy().astype(np.int64) if announced is None else announced.rows
        new, matches = (None, []) if announced is None else (announced.new_pages, announced.prefixes)
        ends = np.cumsum(-(-lengths // PAGE_TOKENS) + prefixes // -PAGE_TOKENS).tolist()
        unknown = np.ones(len(rows), dtype=bool)
        if new is not None and len(new) == ends[-1] and len(matches) == len(rows):
            known = self.requests.known(rows, self.generation[rows], prefixes)
            for i, (row, prefix) in enumerate(zip(rows.tolist(), prefixes.tolist(), strict=True)):
                before = self.requests.of(row) if known[i] else matches[i] if prefix else NO_PAGES
                if before is not None and len(before) == -(-prefix // PAGE_TOKENS):
                    pages = np.concatenate([before, new[ends[i - 1] if i else 0 : ends[i]]])
                    self.requests.put(row, int(self.generation[row]), pages)
                    unknown[i] = False
        if unknown.any():
            self.requests.prefill_rows_read_back += self._read_back(rows[unknown], lengths[unknown])
        return [
            Sequence(self.requests.of(row), prefix, length, decode=False)
            for row, prefix, length in zip(rows.tolist(), prefixes.tolist(), lengths.tolist(), strict=True)
        ]

    def _read_back(self, rows: np.ndarray, lengths: np.ndarray) -> int:
        counts = (-(-lengths // PAGE_TOKENS)).tolist()
        slots = self.req_to_token[upload(rows, self.req_to_token.device), : max(counts) * PAGE_TOKENS : PAGE_TOKENS]
        for row, pages, count in zip(rows.tolist(), read_pages(slots), counts, strict=True):
            self.requests.put(row, int(self.generation[row]), pages[:count])
        return len(rows)
