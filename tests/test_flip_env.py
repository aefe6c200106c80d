"""``scripts/flip-env.sh``: what it says when something is missing. That it works is seen by ``make test-flip``."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "flip-env.sh"
TOOLS = ("bash", "cut", "dirname", "env", "flock", "mkdir", "sha256sum")


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for the PATH that has what the script calls, and no Python."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in TOOLS:
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return folder


def run(tmp_path: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], **variables}
    return subprocess.run(
        [SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


def test_without_a_new_enough_python_it_says_which_it_needs(tmp_path: Path, tools: Path) -> None:
    (tools / "python3.12").write_text("#!/usr/bin/env bash\nexit 127\n")  # as a shim that answers for no version
    (tools / "python3.12").chmod(0o755)
    done = run(tmp_path, PATH=str(tools), PYTHON="/nowhere/python3.12")
    assert done.returncode == 1
    assert only_line(done.stderr).startswith("flip-env: flip-utils needs Python 3.12 or 3.13")
    assert done.stdout == ""


def test_an_environment_that_was_never_made_is_asked_for_in_vain(tmp_path: Path) -> None:
    done = run(tmp_path, "--python", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 1
    assert only_line(done.stderr).startswith("flip-env: ")
    assert done.stdout == ""
    assert not (tmp_path / "cache").exists()
