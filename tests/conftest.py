"""Hypothesis for all tests: no deadlines, since a shared machine can stop for a second anywhere, and the same examples in every run."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


SERVING = Path(__file__).parent / "serving"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Servers first: of two processes one is busy with them for most of the time."""
    items.sort(key=lambda item: SERVING not in item.path.parents)


def pytest_addoption(parser: pytest.Parser) -> None:
    """--on-gpu."""
    parser.addoption("--on-gpu", action="store_true", help="start the servers of tests/serving on the GPU instead of the CPU")
