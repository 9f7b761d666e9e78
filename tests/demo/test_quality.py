"""The coarse KL divergence, and which positions are compared."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.demo.quality import PAGE, Segment, coarse_kl, compare, reference, segments


def test_by_hand():
    # p = (.5, .25 | .25), q = (.25, .25 | .5): KL = .5 ln 2 + 0 + .25 ln .5
    value = coarse_kl([math.log(0.5), math.log(0.25)], [math.log(0.25), math.log(0.25)])
    assert value == pytest.approx(0.25 * math.log(2))


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)), min_size=4, max_size=30), st.integers(1, 3))
def test_never_negative_and_never_above_the_full_divergence(pairs, kept):
    p, q = (np.array(side) / sum(side) for side in zip(*pairs, strict=True))
    full = float((p * np.log(p / q)).sum())
    coarse = coarse_kl(np.log(p[:kept]).tolist(), np.log(q[:kept]).tolist())
    assert -1e-9 <= coarse <= full + 1e-9


def test_all_the_mass_in_the_compared_tokens():
    assert coarse_kl([math.log(0.5)] * 2, [math.log(0.5)] * 2) == pytest.approx(0.0, abs=1e-12)


def test_segments_start_at_a_page_and_stay_inside_the_conversation():
    conversation = SimpleNamespace(ids=list(range(300)), prompt_lengths=[70, 150, 290])
    first, second = segments([conversation], continuation=64)
    assert (first.prefix, len(first.ids), first.positions) == (128, 193, 64)
    assert (second.prefix, len(second.ids), second.positions) == (288, 300, 11)
    assert all(part.prefix % PAGE == 0 for part in (first, second))


class FakeServer:
    """A vocabulary of three tokens with the same distribution everywhere, in the format of SGLang's answers."""

    name = "fake"

    def __init__(self, probabilities, cached):
        self.logs = [math.log(value) for value in probabilities]
        self.cached = cached

    def generate(self, ids, max_new_tokens, *, logprob_start_len=0, top_logprobs_num=0, token_ids_logprob=(), **fields):
        count = len(ids) - logprob_start_len - 1
        ranked = sorted(((value, token, None) for token, value in enumerate(self.logs)), reverse=True)
        meta = {"cached_tokens": self.cached, "input_top_logprobs": [None] + [ranked[:top_logprobs_num]] * count}
        meta["input_token_ids_logprobs"] = [None] + [[(self.logs[token], token, None) for token in token_ids_logprob]] * count
        return {"meta_info": meta}


def test_two_servers_are_compared_position_by_position():
    parts = [Segment(list(range(40)), 32), Segment(list(range(50)), 32)]
    expected = reference(FakeServer([0.6, 0.3, 0.1], cached=32), parts, progress=print)
    quality = compare(FakeServer([0.3, 0.6, 0.1], cached=32), expected, progress=print)
    assert quality.positions == 7 + 17
    assert quality.mean_kl == pytest.approx(0.6 * math.log(2) - 0.3 * math.log(2))
    assert quality.median_kl == pytest.approx(quality.mean_kl)
    assert quality.top1_agreement == 0.0
    assert quality.covered_mass == pytest.approx(1.0)
    assert quality.cached_share == 1.0


def test_a_prefix_that_was_not_cached_is_an_error():
    expected = reference(FakeServer([0.6, 0.3, 0.1], cached=0), [Segment(list(range(40)), 32)], progress=print)
    with pytest.raises(ValueError, match="none of its 32 prefix tokens"):
        compare(FakeServer([0.6, 0.3, 0.1], cached=0), expected, progress=print)
