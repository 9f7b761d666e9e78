"""Pages with a mass slot, as the kernels take them."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from oscar_radix.attention.watched import CHUNK_PAGES, watched_pages
from oscar_radix.geometry import PAGE_TOKENS

PAGES = 200


@settings(max_examples=60, deadline=None)
@given(data=st.data(), batch=st.integers(1, 5), tracked=st.floats(0, 1))
def test_all_of_them_in_order_and_no_other(data, batch, tracked):
    """Shared pages count for each reader; page 0 and whatever stands beyond a sequence's end do not."""
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    slots = np.where(draw.random(PAGES) < tracked, draw.permutation(PAGES), -1).astype(np.int32)
    slots[0] = 3
    lengths = draw.integers(1, 90 * PAGE_TOKENS, batch)
    pages = draw.integers(0, PAGES, (batch, 95)).astype(np.int32)
    watched = watched_pages(slots, pages, lengths)
    expected = [
        (request, page, int(slots[page]), index)
        for request, length in enumerate(lengths.tolist())
        for index, page in enumerate(pages[request, : -(-length // PAGE_TOKENS)].tolist())
        if page and slots[page] >= 0
    ]
    found = [
        (request, *watched.entries[:, entry].tolist()) for request, first, end in watched.chunks.T.tolist() for entry in range(first, end)
    ]
    assert found == expected
    assert watched.entries.shape == (3, len(expected))
    sizes = watched.chunks[2] - watched.chunks[1]
    assert ((sizes > 0) & (sizes <= CHUNK_PAGES)).all()
    assert (watched.entries.dtype, watched.chunks.dtype) == (np.int32, np.int32)


def test_nothing_is_watched():
    watched = watched_pages(np.full(4, -1, dtype=np.int32), np.array([[1, 2]], dtype=np.int32), np.array([64]))
    assert (watched.entries.shape, watched.chunks.shape) == ((3, 0), (3, 0))
