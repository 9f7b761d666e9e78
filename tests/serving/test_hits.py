"""How much of a prompt comes out of the cache."""

from tests.serving.client import WINDOW, cached, computed, flush, pages, piece, settled


def test_next_turn_hits_prompt_and_answer_of_the_turn_before(ours):
    talk = piece(200, seed=10)
    for turn in range(4):
        answer = ours.generate(talk, 45, ignore_eos=True)
        before = len(talk)
        talk = talk + answer["output_ids"]
        known = pages(computed(len(talk)))
        talk = talk + piece(30, seed=20 + turn)
        again = ours.generate(talk, 1)
        assert cached(again) == known
        assert known > before
    settled(ours)


def test_long_prompt_hits_all_but_its_last_page(ours):
    for length in (1000, 992, 961):  # chunks of 256 and a rest; whole pages; one token into a page
        flush(ours)
        prompt = piece(length, seed=30)
        assert cached(ours.generate(prompt, 1)) == 0
        if computed(length + 1) > pages(length) == length:
            # A page beyond the prompt was begun, so the window has left the page that a hit one page before the end needs; from the
            # second reader on that end is known.
            assert cached(ours.generate(prompt, 1)) >= pages(length - 1) - WINDOW
        assert cached(ours.generate(prompt, 1)) == pages(length - 1)
    settled(ours)


def test_hit_does_not_depend_on_how_the_prompt_was_cut(ours):
    prompt = piece(1000, seed=31)
    for cuts in ((), (100,), (311, 640, 641)):
        flush(ours)
        for cut in (*cuts, len(prompt)):
            ours.generate(prompt[:cut], 1)
        assert cached(ours.generate(prompt, 1)) == pages(len(prompt) - 1), cuts


def test_starved_hot_pool_costs_the_recent_window_at_most(ours):
    talk = piece(400, seed=40)
    talk = talk + ours.generate(talk, 60, ignore_eos=True)["output_ids"]
    known = pages(len(talk) - 1)
    for agent in range(9):  # their last windows alone ask for more than the hot pool has
        ours.generate(piece(WINDOW + 40, seed=200 + agent), 1)
    answer = ours.generate(talk + piece(50, seed=41), 1)
    assert cached(answer) == known - WINDOW
    # The recomputed rows are hot again, and the tree's pages have adopted them.
    assert cached(ours.generate(talk + piece(50, seed=41), 1)) == pages(len(talk) + 49)
    settled(ours)
