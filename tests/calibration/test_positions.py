from hypothesis import given
from hypothesis import strategies as st

from oscar_radix.calibration.positions import first_positions


@given(st.integers(1, 40), st.integers(1, 4096), st.integers(1, 200_000))
def test_sequences_stay_within_the_context(sequences, tokens, context):
    places = first_positions(sequences, tokens, context)
    assert len(places) == sequences
    assert places == sorted(places)
    assert all(0 <= place <= max(0, context - tokens) for place in places)


@given(st.integers(2, 40), st.integers(1, 4096), st.integers(2, 50))
def test_half_of_them_begin_at_0_and_one_ends_at_the_end(sequences, tokens, factor):
    places = first_positions(sequences, tokens, tokens * factor)
    assert places.count(0) == -(-sequences // 2)
    assert places[-1] == tokens * factor - tokens
