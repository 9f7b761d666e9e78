"""One sequence of a forward, as the pool and the attention plan see it."""

from dataclasses import dataclass

import numpy as np

from oscar_radix.geometry import PAGE_TOKENS

SINK_PAGES = 2
"""Pages at the start of every sequence that stay at int8 (attention sinks)."""


@dataclass(frozen=True)
class Sequence:
    """A request in a forward: tokens [0, prefix_len) are cached, tokens [prefix_len, seq_len) are computed now.

    Args:
        pages: int64 [ceil(seq_len / 32)], the sequence's pages in order.
        prefix_len: tokens read from the cache; for a decode step all but the newest.
        seq_len: tokens when the forward is done.
        decode: one new token, which is read back from the cache like all others.
    """

    pages: np.ndarray
    prefix_len: int
    seq_len: int
    decode: bool

    def __post_init__(self) -> None:
        needed = -(-self.seq_len // PAGE_TOKENS)
        if len(self.pages) != needed or not 0 <= self.prefix_len < self.seq_len:
            raise ValueError(f"{self.seq_len} tokens after a prefix of {self.prefix_len} take {needed} pages; got {len(self.pages)}")

    @property
    def readable(self) -> int:
        """Tokens that attention reads from the cache in this forward."""
        return self.seq_len if self.decode else self.prefix_len

    def window(self, recent_tokens: int) -> np.ndarray:
        """Pages of the sinks and of the last `recent_tokens` tokens, in order."""
        first = max(0, self.seq_len - recent_tokens) // PAGE_TOKENS
        return np.concatenate([self.pages[: min(SINK_PAGES, first)], self.pages[first:]])

    def matched_end(self, recent_tokens: int) -> np.ndarray:
        """Pages of the last `recent_tokens` tokens before prefix_len: the reader's window when it starts."""
        first = max(0, self.prefix_len - recent_tokens) // PAGE_TOKENS
        return self.pages[first : -(-self.prefix_len // PAGE_TOKENS)]

    @property
    def written(self) -> np.ndarray:
        """Pages that receive tokens in this forward, in order."""
        return self.pages[self.prefix_len // PAGE_TOKENS :]

    @property
    def completed(self) -> np.ndarray:
        """Pages whose 32nd token is written in this forward, in order."""
        return self.pages[self.prefix_len // PAGE_TOKENS : self.seq_len // PAGE_TOKENS]
