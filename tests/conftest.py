"""Fixtures and settings that all test files share, and which tests are left to ``make test-all``."""

import os

import pytest
from hypothesis import settings

from demo_runs import demo_runs
from flip_observability import errors
from flip_observability.settings import Settings

__all__ = ["demo_runs"]
pytest_plugins = ["strict_skips"]

# How long an example takes says more about the machine than about the code.
settings.register_profile("flip", deadline=None)
settings.load_profile("flip")


def pytest_configure() -> None:
    """What somebody has set for a server of theirs is not for the tests. Those that need a variable set it."""
    ours = {str(field.alias) for field in Settings.model_fields.values()} | {"COLUMNS", "FLIP_SERVER_WORKSPACE"}
    for name in list(os.environ):
        if name in ours or name.startswith(("OTEL_", "AWS_")):
            del os.environ[name]


@pytest.hookimpl(tryfirst=True)  # before pytest itself chooses by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A real NVFLARE job takes long, so that ``make test`` has those alone that are marked ``smoke``."""
    for item in items:
        if item.get_closest_marker("nvflare_job") and not item.get_closest_marker("smoke"):
            item.add_marker(pytest.mark.system)


@pytest.fixture(autouse=True)
def _errors_from_the_beginning() -> None:
    """Errors are counted, and each kind is logged once a minute, per process: not what another test had."""
    errors.drain()
    errors._logged.clear()
