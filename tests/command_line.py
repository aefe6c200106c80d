"""``flip-obs`` in this process, as a shell would see it."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import NamedTuple
from unittest import mock

from flip_observability.cli import main


class Result(NamedTuple):
    """Exit code, and what went to stdout and stderr."""

    returncode: int
    stdout: str
    stderr: str


def flip_obs(*arguments: object, answer: str = "") -> Result:
    """Run a command; ``answer`` is what a user types."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["flip-obs", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.StringIO(answer)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    assert "Traceback" not in out.getvalue() + err.getvalue()
    return Result(code, out.getvalue(), err.getvalue())
