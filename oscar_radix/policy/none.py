"""Policy `none`: no hot rows beyond windows, sinks and continuation points. The control with the fewest bytes."""

import numpy as np

from oscar_radix.policy.base import Policy


class NonePolicy(Policy):
    """Drops the hot rows of a page as soon as no window needs them."""

    name = "none"

    def settle(self, pages: np.ndarray) -> int:
        return 0
