"""Fixtures that several test files share."""

from demo_runs import demo_runs

__all__ = ["demo_runs"]
