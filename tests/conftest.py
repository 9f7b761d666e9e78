"""Hypothesis for all tests: no deadlines, since a shared machine can stop for a second anywhere, and the same examples in every run."""

from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")
