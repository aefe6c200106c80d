"""Fixtures and settings that all test files share."""

import pytest
from hypothesis import settings

from demo_runs import demo_runs
from flip_observability import errors

__all__ = ["demo_runs"]

# How long an example takes says more about the machine than about the code.
settings.register_profile("flip", deadline=None)
settings.load_profile("flip")


@pytest.fixture(autouse=True)
def _errors_from_the_beginning() -> None:
    """Errors are counted, and each kind is logged once a minute, per process: not what another test had."""
    errors.drain()
    errors._logged.clear()
