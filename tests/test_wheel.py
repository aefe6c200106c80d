"""The wheel is whole: it has what it needs, nothing else, and runs the demo where nothing of the repository is."""

from __future__ import annotations

import configparser
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--quiet"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "-w", str(folder), str(ROOT)]
    subprocess.run(command, capture_output=True, timeout=300, check=True)
    (made,) = folder.glob("*.whl")
    return made


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(f"{info}/entry_points.txt").decode())
        metadata = archive.read(f"{info}/METADATA").decode()
    assert {name.partition("/")[0] for name in names} == {"flip_observability", info}
    source = ROOT / "src" / "flip_observability"
    tracked = {
        f"flip_observability/{path.relative_to(source).as_posix()}"
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "flip_observability/py.typed" in tracked
    assert {name for name in names if not name.startswith(info)} == tracked
    assert f"{info}/licenses/LICENSE" in names
    assert dict(entries["console_scripts"]) == {"flip-obs": "flip_observability.cli:main"}
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: nvflare" in metadata


@pytest.mark.nvflare_job
@pytest.mark.timeout(900)
def test_it_runs_the_demo_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """The lock is complete, too: with hashes required, pip takes nothing that is not in it."""
    venv = tmp_path / "venv"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment |= {"HOME": str(tmp_path), "PATH": f"{venv / 'bin'}:{os.defpath}"}

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        told = subprocess.run(
            list(map(str, command)),
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-4000:]
        return told

    run(sys.executable, "-m", "venv", venv)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    ours = tmp_path / "ours.txt"
    ours.write_text(f"flip-observability[demo] @ {wheel.as_uri()} --hash=sha256:{digest}\n")
    python = venv / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--require-hashes", "-r", ROOT / "requirements" / "demo.txt", "-r", ours)
    where = run(python, "-c", "import flip_observability, sys; print(flip_observability.__file__, *sys.path)").stdout
    assert str(venv) in where.split()[0]
    assert str(ROOT) not in where.replace(str(venv), "")
    assert "flip-obs" in run(venv / "bin" / "flip-obs", "--help").stdout
    run(venv / "bin" / "flip-obs", "demo")
