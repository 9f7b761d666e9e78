from hypothesis import given
from hypothesis import strategies as st

from oscar_radix.calibration.positions import first_positions
from oscar_radix.calibration.sequences import SHORTEST, placed_sequences


@given(st.integers(0, 5000), st.integers(SHORTEST, 700))
def test_the_whole_text_and_passages_twice(count, length):
    tokens = list(range(count))
    sequences = [each for each, _ in placed_sequences(tokens, 8192, length)]
    assert all(SHORTEST // 2 <= len(each) <= length for each in sequences)
    plain = [each for each in sequences if len(set(each)) == len(each)]
    twice = [each for each in sequences if each not in plain]
    # Whole but for a remainder that is too short.
    covered = sorted(token for each in plain for token in each)
    assert covered == tokens[: len(covered)]
    assert count - len(covered) < SHORTEST
    assert len(twice) == len(plain) // 2
    for each in twice:
        half = len(each) // 2
        assert each[:half] == each[half:] == list(range(each[0], each[0] + half))


def test_either_half_has_both_kinds():
    sequences = placed_sequences(list(range(8 * 64)), 1024, 64)
    twice = [len(set(each)) < len(each) for each, _ in sequences]
    assert len(twice) == 12
    assert sum(twice[:6]) == sum(twice[6:]) == 2
    assert [place for _, place in sequences] == first_positions(12, 64, 1024)


@given(st.integers(SHORTEST, 2000), st.integers(SHORTEST, 700))
def test_no_sequence_leaves_the_context(context, length):
    for each, place in placed_sequences(list(range(3000)), context, length):
        assert place + len(each) <= context
