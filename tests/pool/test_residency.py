"""Which pages are hot: windows and sinks always, continuation points and prompts in progress while there is room, fresh pages at any
price.
"""

import numpy as np
import pytest

from oscar_radix.geometry import PAGE_TOKENS
from oscar_radix.pool.store import KVStore
from oscar_radix.sequence import SINK_PAGES, Sequence
from tests.helpers import make_store, page_count

RECENT = 64


class Driver:
    """Sequences in a store whose forwards are prepared but not run: residency knows no data."""

    def __init__(self, hot_pages: int, policy: str = "none", pages: int = 64):
        self.store: KVStore = make_store(pages, hot_pages, policy, RECENT)
        self._next = 1

    def sequence(self, tokens: int, shared: np.ndarray = ()) -> "Conversation":
        """Pages for `tokens`, the first of them `shared` ones that another conversation has computed."""
        own = np.arange(self._next, self._next + page_count(tokens) - len(shared))
        self._next += len(own)
        self.store.allocate(own)
        return Conversation(np.concatenate([np.array(shared, dtype=np.int64), own]), len(shared) * PAGE_TOKENS)

    def forward(self, *steps: tuple["Conversation", int], decode: bool = False) -> None:
        sequences = []
        for conversation, grow in steps:
            done = conversation.done
            conversation.done += grow
            sequences.append(Sequence(conversation.pages[: page_count(conversation.done)], done, conversation.done, decode))
        self.store.residency.prepare(sequences)
        self.store.hot.check_integrity()

    def hot(self, conversation: "Conversation") -> list[int]:
        """Indices of the conversation's whole pages."""
        return np.flatnonzero(self.store.is_whole(conversation.pages)).tolist()


class Conversation:
    def __init__(self, pages: np.ndarray, done: int):
        self.pages = pages
        self.done = done


# Windows and sinks ---------------------------------------------------------------------------------------------------


def test_sinks_and_window_stay_the_middle_goes():
    """Policy `none`, W two pages, 10 pages of prompt and a tail: what the first decode step keeps."""
    driver = Driver(hot_pages=30)
    a = driver.sequence(340)
    driver.forward((a, 325))
    assert driver.hot(a) == list(range(11)), "the prompt in progress is all hot"
    driver.forward((a, 1), decode=True)
    assert driver.hot(a) == [0, 1, 8, 9, 10], "sinks, and every page of the last 64 tokens (262 to 325)"


def test_the_window_moves_with_the_sequence():
    driver = Driver(hot_pages=30)
    a = driver.sequence(500)
    driver.forward((a, 300))
    for _ in range(150):
        driver.forward((a, 1), decode=True)
        first = (a.done - RECENT) // PAGE_TOKENS
        expected = sorted({*range(SINK_PAGES), *range(first, page_count(a.done))})
        assert driver.hot(a) == expected
    assert driver.store.residency.demotions > 0


def test_window_policy_keeps_everything_while_there_is_room():
    driver = Driver(hot_pages=30, policy="window")
    a = driver.sequence(340)
    driver.forward((a, 325))
    driver.forward((a, 1), decode=True)
    assert driver.hot(a) == list(range(11))


def test_window_policy_gives_up_the_least_recently_used_first():
    driver = Driver(hot_pages=12, policy="window")
    a, b = driver.sequence(320), driver.sequence(320)
    driver.forward((a, 256))
    driver.forward((a, 1), decode=True)
    driver.forward((b, 160))
    assert driver.hot(b) == [0, 1, 2, 3, 4]
    assert driver.hot(a) == [0, 1, 4, 5, 6, 7, 8], "middle pages of a, from its start; sinks and window stay"


def test_random_policy_keeps_two_rows_a_page():
    driver = Driver(hot_pages=30, policy="random")
    a = driver.sequence(340)
    driver.forward((a, 325))
    driver.forward((a, 1), decode=True)
    assert driver.store.hot.levels[a.pages].tolist() == [32, 32, 2, 2, 2, 2, 2, 2, 32, 32, 32]


# Prompts in progress -------------------------------------------------------------------------------------------------


def test_a_prompt_in_progress_stays_hot_over_its_chunks():
    driver = Driver(hot_pages=30)
    a = driver.sequence(700)
    for _ in range(7):
        driver.forward((a, 96))
        assert driver.hot(a) == list(range(page_count(a.done)))


def test_a_prompt_in_progress_gives_way_only_when_the_pool_is_full():
    driver = Driver(hot_pages=10)
    a = driver.sequence(700)
    for _ in range(7):
        driver.forward((a, 96))
    hot = driver.hot(a)
    assert len(hot) == 10, "no block is idle"
    assert {19, 20} <= set(hot), "the newest pages"
    assert driver.store.residency.sealed_without_hot_rows + driver.store.residency.demotions == 21 - 10


def test_the_newest_pages_of_a_chunk_stay_hot_when_it_is_larger_than_the_pool():
    driver = Driver(hot_pages=4)
    a = driver.sequence(330)
    driver.forward((a, 325))
    assert driver.hot(a) == [0, 1, 9, 10], "sinks, and the newest"
    assert driver.store.residency.sealed_without_hot_rows == 7


def test_prompts_give_way_before_windows_of_others():
    driver = Driver(hot_pages=12)
    a, b = driver.sequence(200), driver.sequence(700)
    driver.forward((a, 190))
    driver.forward((a, 1), decode=True)
    window = driver.hot(a)
    driver.forward((b, 320))
    driver.forward((b, 320))
    assert set(window) - {0, 1} <= set(driver.hot(a)) | {0, 1}
    assert driver.hot(b)[-2:] == [18, 19]


def test_pages_that_this_forward_reads_do_not_give_way_to_pages_that_it_writes():
    """`a` has all five pages of the pool in its window or among its sinks; `b` is sealed from its rows without entering the pool."""
    driver = Driver(hot_pages=5)
    a, b = driver.sequence(160), driver.sequence(64)
    driver.forward((a, 128))
    driver.forward((a, 1), (b, 64))
    assert driver.hot(a) == [0, 1, 2, 3, 4]
    assert driver.hot(b) == []
    assert driver.store.residency.sealed_without_hot_rows == 2


def test_windows_of_requests_that_sit_out_give_way_to_windows_of_those_that_run():
    driver = Driver(hot_pages=5)
    a, b = driver.sequence(160), driver.sequence(64)
    driver.forward((a, 128))
    driver.forward((a, 1), decode=True)
    driver.forward((b, 64))
    assert driver.hot(b) == [0, 1]
    assert len(driver.hot(a)) == 3
    assert 4 in driver.hot(a), "its partial page"


# Continuation points -------------------------------------------------------------------------------------------------


def finished(driver: Driver, tokens: int = 256) -> Conversation:
    """A conversation whose pages are done; the end of it is where a next turn continues."""
    a = driver.sequence(tokens)
    driver.forward((a, tokens))
    driver.store.end_prefill(a.pages)
    driver.store.set_continuation_points(a.pages, [len(a.pages)], 2)
    driver.store.table.window[a.pages] = False
    return a


def test_the_end_of_a_conversation_stays_hot():
    driver = Driver(hot_pages=30)
    a, b = finished(driver), driver.sequence(64)
    driver.forward((b, 33))
    assert driver.hot(a) == [6, 7], "policy `none` has dropped everything else"


def test_where_a_reader_branches_off_is_a_continuation_point():
    driver = Driver(hot_pages=30, policy="window")
    a = finished(driver)
    b = driver.sequence(400, shared=a.pages[:5])
    driver.forward((b, 200))
    assert np.flatnonzero(driver.store.table.continuation[a.pages]).tolist() == [3, 4, 6, 7]


def test_later_chunks_of_a_prompt_are_no_continuation_points():
    driver = Driver(hot_pages=30)
    a = driver.sequence(400)
    for _ in range(4):
        driver.forward((a, 96))
    assert not driver.store.table.continuation.any()


def test_continuation_points_go_in_the_order_of_their_last_use():
    driver = Driver(hot_pages=8)
    first, second = finished(driver, 64), finished(driver, 64)
    b = driver.sequence(96, shared=first.pages)  # the first is read again
    driver.forward((b, 1))
    c = driver.sequence(160)
    driver.forward((c, 130))
    assert driver.hot(first) == [0, 1]
    assert driver.hot(second) == []
    assert not driver.store.table.continuation[second.pages].any(), "a cold page is no place to continue"


# Fresh pages ---------------------------------------------------------------------------------------------------------


def test_partial_pages_are_never_demoted():
    """Eight conversations with a partial page each, in a pool of nine, against a long prompt."""
    driver = Driver(hot_pages=9)
    small = [driver.sequence(20) for _ in range(8)]
    for conversation in small:
        driver.forward((conversation, 10))
    long = driver.sequence(500)
    driver.forward((long, 490))
    for conversation in small:
        assert driver.hot(conversation) == [0]
    assert driver.hot(long) == [15], "its partial page has the one that was left"


def test_a_page_whose_record_is_not_written_yet_is_no_victim():
    """Two sequences complete pages in one forward that overfills the pool: neither takes the other's rows before they are sealed."""
    driver = Driver(hot_pages=4)
    a, b = driver.sequence(80), driver.sequence(80)
    driver.forward((a, 20), (b, 20))
    driver.forward((a, 50), (b, 50))
    # Pages 0 held rows of the forward before, which their records need: they must still be whole.
    assert driver.hot(a) == [0, 2]
    assert driver.hot(b) == [0, 2]
    assert driver.store.residency.sealed_without_hot_rows == 2, "pages 1 began and ended in this forward"


def test_a_pool_too_small_for_the_partial_pages_says_so():
    driver = Driver(hot_pages=2)
    sequences = [driver.sequence(20) for _ in range(3)]
    with pytest.raises(RuntimeError, match="the hot pool of 32 blocks is full of unsealed pages: 3 sequences need one page of 16 blocks"):
        driver.forward(*((sequence, 10) for sequence in sequences))


def test_everything_sealed_gives_way_to_a_partial_page():
    driver = Driver(hot_pages=4)
    a = driver.sequence(128)
    driver.forward((a, 128))
    assert driver.hot(a) == [0, 1, 2, 3]
    others = [driver.sequence(20) for _ in range(4)]
    driver.forward(*((other, 10) for other in others))
    assert driver.hot(a) == []
    assert all(driver.hot(other) == [0] for other in others)


# Bookkeeping ---------------------------------------------------------------------------------------------------------


def test_pages_are_sealed_when_their_last_token_is_written():
    driver = Driver(hot_pages=10)
    a = driver.sequence(100)
    driver.forward((a, 31))
    assert not driver.store.table.sealed[a.pages].any()
    driver.forward((a, 1), decode=True)
    assert driver.store.table.sealed[a.pages].tolist() == [True, False, False, False]
    driver.forward((a, 63))
    assert driver.store.table.sealed[a.pages].tolist() == [True, True, False, False]


@pytest.mark.parametrize("policy", ["window", "none", "random", "attention"])
def test_demotions_are_counted(policy):
    driver = Driver(hot_pages=6, policy=policy)
    a = driver.sequence(640)
    for _ in range(6):
        driver.forward((a, 96))
    lost = int(driver.store.table.sealed.sum()) - len(driver.hot(a))
    counted = driver.store.residency.demotions + driver.store.residency.sealed_without_hot_rows
    assert counted >= lost > 0


@pytest.mark.parametrize(("prefix", "length", "pages"), [(0, 33, 1), (33, 33, 2), (-1, 5, 1), (0, 32, 2)])
def test_a_sequence_with_the_wrong_pages_is_refused(prefix, length, pages):
    with pytest.raises(ValueError, match=rf"{length} tokens after a prefix of {prefix} take . pages; got {pages}"):
        Sequence(np.arange(1, pages + 1), prefix, length, decode=False)
