"""Memory of this machine that a new process may still take."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
"""Files of cgroups version 2 and 1: what the processes of a container may take together, and what they have."""

DEFAULT_SHARE = 0.1
"""Part of the available memory that copies of pages take on a GPU host if nobody says how much."""


def available_bytes(cgroup: Path = CGROUP) -> int:
    """Bytes that are free or can be freed, on the machine or within the limit of this container, whichever is less.

    Args:
        cgroup: where the files of LIMITS are.
    """
    available = psutil.virtual_memory().available
    for limit, used in LIMITS:
        try:
            left = int((cgroup / limit).read_text()) - int((cgroup / used).read_text())
        except (OSError, ValueError):  # there is no such file, or "max": no limit
            continue
        available = min(available, max(left, 0))
    return available
