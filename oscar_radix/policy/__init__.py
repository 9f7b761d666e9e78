"""Precision policies by name."""

from oscar_radix.policy.attention import AttentionPolicy
from oscar_radix.policy.base import LEVELS, Policy
from oscar_radix.policy.none import NonePolicy
from oscar_radix.policy.random import RandomPolicy
from oscar_radix.policy.window import WindowPolicy

POLICIES: dict[str, type[Policy]] = {policy.name: policy for policy in (WindowPolicy, NonePolicy, RandomPolicy, AttentionPolicy)}

__all__ = ["LEVELS", "POLICIES", "AttentionPolicy", "NonePolicy", "Policy", "RandomPolicy", "WindowPolicy"]
