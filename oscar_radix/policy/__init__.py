"""Precision policies by name."""

from oscar_radix.policy.attention import HOT_ROWS, AttentionPolicy
from oscar_radix.policy.base import LEVELS, Policy
from oscar_radix.policy.none import NonePolicy
from oscar_radix.policy.random import RandomPolicy
from oscar_radix.policy.window import WindowPolicy

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (WindowPolicy, NonePolicy, RandomPolicy, AttentionPolicy)}

__all__ = ["HOT_ROWS", "LEVELS", "POLICIES", "AttentionPolicy", "NonePolicy", "Policy", "RandomPolicy", "WindowPolicy", "make_policy"]


def make_policy(name: str, hot_rows: int = HOT_ROWS[-1]) -> Policy:
    """The policy of this name; `hot_rows` is the most that `attention` lets a page keep."""
    return AttentionPolicy(hot_rows) if name == AttentionPolicy.name else POLICIES[name]()
