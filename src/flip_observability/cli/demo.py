"""``flip-obs demo``."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from flip_observability.cli.common import CommandError


class Scenario(str, Enum):
    """What goes wrong in the demo."""

    SUCCESS = "success"
    FATAL = "fatal"
    ABORT = "abort"
    UPLOAD_FAILURE = "upload-failure"
    HUB_OUTAGE = "hub-outage"


def demo(
    scenario: Annotated[
        Scenario, typer.Option(help="What goes wrong in the run, and must end well nevertheless.")
    ] = Scenario.SUCCESS,
) -> None:
    """A real federated run on this machine, with a hub and a bucket of its own."""
    from flip_observability.demo.runner import DemoError, run_demo

    try:
        code = run_demo(scenario.value)
    except DemoError as error:
        raise CommandError(str(error)) from None
    raise typer.Exit(code)
