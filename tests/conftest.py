"""Hypothesis for all tests: no deadlines, since a shared machine can stop for a second anywhere, and the same examples in every run."""

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


def pytest_addoption(parser: pytest.Parser) -> None:
    """--on-gpu."""
    parser.addoption("--on-gpu", action="store_true", help="start the servers of tests/serving on the GPU instead of the CPU")
