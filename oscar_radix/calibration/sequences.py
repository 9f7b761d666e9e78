"""What a calibration runs through the model, and where: pieces of its text and passages of it said twice, all over the context."""

from oscar_radix.calibration.positions import first_positions

SEQUENCE_TOKENS = 1024
SHORTEST = 64
"""A remainder below this is dropped: its value weights would come from a handful of queries."""


def placed_sequences(tokens: list[int], context: int, length: int = SEQUENCE_TOKENS) -> list[tuple[list[int], int]]:
    """Token ids in sequences of at most `length`, each with its first position: what `oscar-radix calibrate` and a server both run.

    The whole text in pieces and, for every two of them, a passage twice over. Models look far back when they quote, and text hardly ever
    quotes itself: heads that copy would be calibrated on queries that rest on the first token. Either kind stands at both ends of the
    context.

    Args:
        tokens: of the text.
        context: positions that the model has; no sequence is longer.
    """
    length = min(length, context)
    pieces = [tokens[at : at + length] for at in range(0, len(tokens), length)]
    pieces = [piece for piece in pieces if len(piece) >= SHORTEST]
    half = length // 2
    count = len(pieces) // 2
    starts = [index * max(0, len(tokens) - half) // max(1, count - 1) for index in range(count)]
    every = pieces + [tokens[at : at + half] * 2 for at in starts]
    # Positions rise along the list: every other sequence first, so that both kinds are spread over them.
    every = every[::2] + every[1::2]
    return list(zip(every, first_positions(len(every), length, context), strict=True))
