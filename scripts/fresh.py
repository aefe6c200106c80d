"""``make fresh``: README's two commands on a machine that has nothing but Python, git and make.

The last commit is cloned in a new container by an ordinary user, who then types what README says. What passes here does
not stand on anything that only a developer's machine has: an installed program, a locale, a setting, root's rights.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from scripts.base_image import add_arguments, base_image
from scripts.containers import ContainerError, Engine, PassedOn, find_engine, mount, passed_on

REPOSITORY = Path(__file__).resolve().parent.parent
USER = "dev"
HOME = f"/home/{USER}"
CLONE = f"{HOME}/flip-observability"
BUNDLE = "/mnt/repository.bundle"
PIP_FILES = "/mnt/pip"
COMMANDS = ("make demo", "make test")
TAIL_LINES = 40

# Process 1 takes in the processes that others leave behind, as every machine's does.
FIRST_PROCESS = 'trap "exit 0" TERM; while :; do sleep 3600 & wait $!; done'

# A container of an ordinary user's podman may come with an entry for that user.
MAKE_USER = f"""
set -eu
sed -i "/^[^:]*:[^:]*:$1:/d" /etc/passwd
useradd --create-home --shell /bin/bash --uid "$1" {USER}
shift
for place; do
  case "$place" in
    /*) install -D --mode 644 "{PIP_FILES}/${{place##*/}}.etc" "$place" ;;
    *) runuser -u {USER} -- mkdir -p "{HOME}/${{place%/*}}"
       install --owner {USER} --group {USER} --mode 600 "{PIP_FILES}/$place" "{HOME}/$place" ;;
  esac
done
"""


@dataclass(frozen=True)
class Played:
    """A command that was typed, how long it took, and how it ended."""

    command: str
    seconds: float
    exit_code: int

    def __str__(self) -> str:
        verdict = "passed" if self.exit_code == 0 else f"FAILED with exit code {self.exit_code}"
        return f"{self.command:<24} {self.seconds:7.0f} s  {verdict}"


def play(commands: Sequence[str], run: Callable[[str], int], say: Callable[[str], None]) -> list[Played]:
    """Run the commands one after the other, each whatever became of the one before."""
    played = []
    for command in commands:
        say(f"{command} ...")
        begun = time.monotonic()
        exit_code = run(command)
        played.append(Played(command, time.monotonic() - begun, exit_code))
        say(str(played[-1]))
    return played


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ContainerError(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def container(engine: Engine, image: str, bundle: Path, settings: PassedOn) -> Iterator[str]:
    """A new container with an ordinary user in it, removed afterwards.

    Yields:
        Its name.
    """
    name = f"flip-obs-fresh-{uuid.uuid4().hex[:12]}"
    options = ["--detach", f"--name={name}", "--user=0", "--security-opt=label=disable", mount(bundle, BUNDLE)]
    options += [*engine.network, *settings.options()]
    options += [mount(file, f"{PIP_FILES}/{_staged(place)}") for file, place in settings.pip_files]
    if engine.rootless:
        options.append("--userns=keep-id")
    try:
        engine.must("run", *options, image, "bash", "-c", FIRST_PROCESS)
        places = [place for _, place in settings.pip_files]
        # The user's own number: what this machine lets the user read can be read inside, too.
        number = str(os.getuid() or 1000)
        engine.must("exec", "--user=0", name, "bash", "-c", MAKE_USER, "make-user", number, *places)
        yield name
    finally:
        engine.start("rm", "--force", "--volumes", name)


def _staged(place: str) -> str:
    return f"{Path(place).name}.etc" if place.startswith("/") else place


def in_container(engine: Engine, name: str, log: IO[str]) -> Callable[[str], int]:
    """What runs a command as the ordinary user, in the clone once there is one, with its output in the log."""

    def run(command: str) -> int:
        log.write(f"\n$ {command}\n")
        log.flush()
        folder = HOME if command.startswith("git clone") else CLONE
        who = [f"--user={USER}", f"--workdir={folder}", f"--env=HOME={HOME}", f"--env=USER={USER}"]
        line = ["exec", *who, f"--env=LOGNAME={USER}", name, "bash", "-c", command]
        return engine.start(*line, stdout=log, stderr=subprocess.STDOUT).returncode

    return run


def _fresh(arguments: argparse.Namespace, log: IO[str]) -> list[Played]:
    engine, image = base_image(find_engine(), arguments.suite, rebuild=arguments.rebuild)
    settings = passed_on(os.environ)
    _say(f"image:     {image}")
    _say(f"commit:    {_git('log', '-1', '--format=%h %s')}")
    if changed := len(_git("status", "--porcelain").splitlines()):
        _say(f"           without the {changed} files that are changed here and not committed")
    _say(f"passed on: {', '.join(settings.variables) or 'no variable'}")
    _say(f"log:       {log.name}")
    with tempfile.TemporaryDirectory(prefix="flip-obs-fresh-") as folder:
        bundle = Path(folder, "repository.bundle")
        _git("bundle", "create", str(bundle), "HEAD")
        bundle.chmod(0o644)
        with container(engine, image, bundle, settings) as name:
            run = in_container(engine, name, log)
            clone = play([f"git clone {BUNDLE} {CLONE}"], run, lambda _: None)
            if clone[0].exit_code:
                return clone
            return play(arguments.command or COMMANDS, run, _say)


def main(argv: Sequence[str] | None = None) -> int:
    """Play README's commands.

    Returns:
        0 when all of them passed, otherwise 1.
    """
    parser = argparse.ArgumentParser(prog="make fresh", description="README's commands in a new container.")
    add_arguments(parser)
    parser.add_argument("--command", action="append", help="instead of README's; repeatable")
    arguments = parser.parse_args(argv)
    # The container is removed when this is told to end, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    handle, path = tempfile.mkstemp(prefix="flip-obs-fresh-", suffix=".log")
    os.close(handle)
    log_path = Path(path)
    try:
        with log_path.open("w", encoding="utf-8") as log:
            played = _fresh(arguments, log)
    except ContainerError as error:
        _say(f"make fresh: {error}")
        return 1
    failed = any(one.exit_code for one in played)
    if failed:
        _say("\n".join(["", *log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]]))
    _say("\n".join(["", *map(str, played), f"log: {path}"]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
