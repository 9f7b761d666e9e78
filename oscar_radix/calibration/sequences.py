"""What a calibration runs through the model: pieces of its text, and passages of it said twice."""

SEQUENCE_TOKENS = 1024
SHORTEST = 64
"""A remainder below this is dropped: its value weights would come from a handful of queries."""


def calibration_sequences(tokens: list[int], length: int = SEQUENCE_TOKENS) -> list[list[int]]:
    """Token ids in sequences of at most `length`: the whole text in pieces and, for every two of them, a passage twice over.

    Models look far back when they quote, and text hardly ever quotes itself: heads that copy would be calibrated on queries that rest
    on the first token. Neighbours in the list stand at different ends of the context (`positions.first_positions`), of either kind.
    """
    pieces = [tokens[at : at + length] for at in range(0, len(tokens), length)]
    pieces = [piece for piece in pieces if len(piece) >= SHORTEST]
    half = length // 2
    count = len(pieces) // 2
    starts = [index * max(0, len(tokens) - half) // max(1, count - 1) for index in range(count)]
    every = pieces + [tokens[at : at + half] * 2 for at in starts]
    return every[::2] + every[1::2]
