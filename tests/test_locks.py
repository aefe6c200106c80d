"""The locks hold all that pyproject.toml asks for, by hash, and name no place that it came from."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import test_compose

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {path.stem: path for path in sorted((ROOT / "requirements").glob("*.txt"))}
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
EXTRAS = {"run": (), "demo": ("demo",), "dev": ("dev",)}
GROUPS = ("build", "fuzz", "release")
PIN = re.compile(r"(?P<name>[a-z0-9-]+)==(?P<version>[0-9][0-9a-z.!+]*)(?P<marker> ; [a-z0-9_.'=<>!*() ]+)? \\", re.I)
HASH = re.compile(r" {4}--hash=sha256:[0-9a-f]{64}( \\)?")


def environment(python: str) -> dict[str, str]:
    """What markers are judged by: a server."""
    return {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "os_name": "posix",
        "platform_machine": "x86_64",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }


def pins(lock: str, python: str) -> dict[str, str]:
    """Name and version of what a lock installs."""
    found: dict[str, str] = {}
    for line in LOCKS[lock].read_text().splitlines():
        if not line.startswith(("#", " ")):
            requirement = Requirement(line.removesuffix("\\"))
            if requirement.marker is None or requirement.marker.evaluate(environment(python)):
                assert requirement.name not in found, f"{lock}: two versions of {requirement.name} for {python}"
                found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


def asked(lock: str) -> Iterator[Requirement]:
    """What pyproject.toml wants to be in a lock."""
    if lock in GROUPS:
        yield from group(lock)
        return
    yield from map(Requirement, PROJECT["dependencies"])
    for extra in EXTRAS[lock]:
        yield from optional(extra)


def group(name: str) -> Iterator[Requirement]:
    for item in PYPROJECT["dependency-groups"][name]:
        if isinstance(item, str):
            yield Requirement(item)
        else:
            yield from group(item["include-group"])


def optional(extra: str) -> Iterator[Requirement]:
    for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                yield from optional(other)
        else:
            yield requirement


def test_there_is_a_lock_for_everything_that_is_installed() -> None:
    assert set(LOCKS) == {*EXTRAS, *GROUPS}
    assert set(GROUPS) == set(PYPROJECT["dependency-groups"])


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("lock", sorted(LOCKS))
def test_it_covers_pyproject(lock: str, python: str) -> None:
    held = pins(lock, python)
    for requirement in asked(lock):
        if requirement.marker is None or requirement.marker.evaluate(environment(python)):
            version = held.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement} is not in {lock}.txt: make lock"
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, {version}: make lock"


@pytest.mark.parametrize("python", PYTHONS)
def test_what_is_tested_is_what_is_installed(python: str) -> None:
    tested = pins("dev", python).items()
    assert pins("run", python).items() <= pins("demo", python).items() <= tested
    for lock in GROUPS:
        assert {(name, version) for name, version in pins(lock, python).items() if name in dict(tested)} <= tested


@pytest.mark.parametrize("lock", sorted(LOCKS))
def test_each_package_has_hashes_and_nothing_says_where_it_came_from(lock: str) -> None:
    first, *lines = LOCKS[lock].read_text().splitlines()
    assert re.fullmatch(r"# [\w ,:`.]+ `make lock` writes it from pyproject\.toml\.", first)
    assert lines
    for line, following in zip(lines, [*lines[1:], "end==0 \\"], strict=True):
        if line.startswith(" "):
            assert HASH.fullmatch(line), line
            assert line.endswith("\\") == following.startswith(" ")
        else:
            assert PIN.fullmatch(line), line
            assert following.startswith(" "), f"{line}: no hash"


def test_the_images_hold_what_the_locks_say_and_nothing_else() -> None:
    commands = [
        shlex.split(command)
        for item in test_compose.parse_dockerfile(test_compose.DOCKERFILE.read_text())
        if item["instruction"] == "RUN"
        for command in item["value"].split("&&")
    ]
    pip = [command for command in commands if command[0] == "pip"]
    locked = [command for command in pip if "--require-hashes" in command]
    assert [Path(command[-1]).name for command in locked] == ["build.txt", "run.txt", "demo.txt"]
    assert [command[-2] for command in locked] == ["--requirement"] * 3
    assert all("--no-deps" in command for command in pip if command not in locked)
    assert len(pip) == len(locked) + 2


def test_setting_up_installs_the_lock() -> None:
    text = (ROOT / "Makefile").read_text()
    assert re.search(r"^LOCKED \?= 1$", text, re.MULTILINE)
    assert re.search(r"^\$\(STAMP\): .*requirements/dev\.txt", text, re.MULTILINE)
    assert text.count("--require-hashes -r requirements/dev.txt") == 1
