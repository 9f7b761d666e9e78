"""Memory of this machine that a new process may still take."""

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")
LIMITS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Files of cgroups version 2 and 1: what the processes of a container may take together, what they have, and of what kinds; the kind that
is cached files, which give way."""

DEFAULT_SHARE = 0.1
"""Part of the available memory that copies of pages take on a GPU host if nobody says how much."""

DEFAULT_LEAST_GIB = 1.0
"""Less than that is not taken: it may be too little for one recent window on every rank."""


def available_bytes(cgroup: Path = CGROUP) -> int:
    """Bytes that are free or can be freed, on the machine or within the limit of this container, whichever is less.

    Args:
        cgroup: where the files of LIMITS are.
    """
    available = psutil.virtual_memory().available
    for limit, used, kinds, cached in LIMITS:
        try:
            left = int((cgroup / limit).read_text()) - int((cgroup / used).read_text())
            by_kind = dict(line.split() for line in (cgroup / kinds).read_text().splitlines())
        except (OSError, ValueError):  # there is no such file, or "max": no limit
            continue
        available = min(available, max(left + int(by_kind.get(cached, 0)), 0))
    return available
