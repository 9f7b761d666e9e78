"""Which pages the requests of a forward have: known on the host from what the allocator and the tree handed out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.patches.flags import config_of
from oscar_radix.patches.host_pages import note_requests, noted_new_pages, noted_pages, noted_requests, read_pages
from oscar_radix.pool.request_pages import DecodeStep, RequestPages
from oscar_radix.pool.upload import upload
from oscar_radix.sequence import Sequence

NO_PAGES = np.zeros(0, dtype=np.int64)


def init_new(original: Callable[..., Any], cls: type, batch: Any, model_runner: Any, **kwargs: Any) -> Any:
    """AROUND ForwardBatch.init_new: note on the forward's slots what only the scheduler's batch knows on the host."""
    forward = original(cls, batch, model_runner, **kwargs)
    if config_of(model_runner.server_args) is not None:
        note_batch(forward, batch)
    return forward


def note_batch(forward: Any, batch: Any) -> None:
    """Note the rows of a ScheduleBatch on the slots of its ForwardBatch, and for a prefill the pages of the matched prefixes."""
    rows, slots = batch.req_pool_indices_cpu, forward.out_cache_loc
    if rows is None or slots is None or len(rows) != forward.batch_size:
        return
    prefixes = [noted_pages(req.prefix_indices) for req in batch.reqs] if forward.forward_mode.is_extend() else []
    note_requests(slots, rows.numpy(), prefixes)


class ForwardPages:
    """Keeps `requests` up to date, forward by forward.

    A prefill begins a request's list (matched pages and new ones), a decode step adds the page that was taken for its token. Where a
    note is missing or a list is not as long as it should be, the row is read from the device, which is slower and is counted.

    Args:
        rows: SGLang's ReqToTokenPool.
        requests: the lists.
    """

    def __init__(self, rows: Any, requests: RequestPages):
        self.req_to_token: torch.Tensor = rows.req_to_token
        self.generation: np.ndarray = rows.req_generation.numpy()
        self.requests = requests

    def decode(self, forward: Any) -> DecodeStep:
        """The requests of a decode forward; padding rows of CUDA graphs (one token) are left out."""
        lengths = forward.seq_lens_cpu.numpy().astype(np.int64)
        noted = noted_requests(forward.out_cache_loc)
        if noted is None:
            real = lengths > 1
            rows, lengths = forward.req_pool_indices.cpu().numpy().astype(np.int64)[real], lengths[real]
        else:
            rows = noted[0]
            lengths = lengths[: len(rows)]
        known = self.requests.known(rows, self.generation[rows], lengths - 1)
        begins = lengths % PAGE_TOKENS == 1
        new = noted_new_pages(forward.out_cache_loc)
        if noted is None or new is None or len(new) != np.count_nonzero(begins):
            known &= ~begins
        else:
            self.requests.append(rows[begins & known], new[known[begins]])
        if not known.all():
            self.requests.decode_rows_read_back += self._read_back(rows[~known], lengths[~known])
        return DecodeStep(self.requests, rows, lengths)

    def extend(self, forward: Any) -> list[Sequence]:
        """The requests of a prefill forward."""
        lengths = forward.seq_lens_cpu.numpy().astype(np.int64)
        prefixes = np.array(forward.extend_prefix_lens_cpu, dtype=np.int64)
        rows, matches = noted_requests(forward.out_cache_loc) or (forward.req_pool_indices.cpu().numpy().astype(np.int64), [])
        ends = np.cumsum(-(-lengths // PAGE_TOKENS) + prefixes // -PAGE_TOKENS).tolist()
        new = noted_new_pages(forward.out_cache_loc)
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
