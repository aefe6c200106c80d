"""Which process lives: only what is seen is told, and what can be no job's is not believed."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from flip_observability import process
from flip_observability.process import ProcessIdentity, current_process
from waiting import process_of, wait_for


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A Python process beside this one's ancestors, as a job's is."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        wait_for(lambda: "python" in os.readlink(f"/proc/{child.pid}/exe"))
        yield child
        child.kill()


def test_a_job_of_ours_lives_until_it_is_gone(child: subprocess.Popen[bytes]) -> None:
    identity = process_of(child.pid)
    assert (identity.is_alive(), identity.is_alive_as_job(), identity.is_alive_as_observer()) == (True,) * 3
    assert dataclasses.replace(identity, start_ticks=identity.start_ticks + 1).is_alive() is False
    child.kill()
    wait_for(lambda: identity.is_alive_as_job() is False, what="a zombie is gone")
    child.wait()
    assert (identity.is_alive(), identity.is_alive_as_job(), identity.is_alive_as_observer()) == (False,) * 3


def test_what_can_be_no_job_is_not_believed_to_be_one() -> None:
    for hostile in (process_of(1), process_of(os.getppid()), current_process()):
        assert hostile.is_alive() is True
        assert hostile.is_alive_as_job() is None


def test_what_is_no_python_is_neither_job_nor_observer() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        wait_for(lambda: "python" not in os.readlink(f"/proc/{child.pid}/exe"))
        identity = process_of(child.pid)
        assert (identity.is_alive(), identity.is_alive_as_job(), identity.is_alive_as_observer()) == (True, None, None)
        child.kill()


def test_of_another_user_only_root_believes(child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    identity = process_of(child.pid)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 4_711)
    assert (identity.is_alive_as_job(), identity.is_alive_as_observer()) == (None, None)


@pytest.mark.parametrize("hidden", ["stat", "boot_id", "pid_ns", "descriptors"])
def test_what_cannot_be_read_is_no_death(
    child: subprocess.Popen[bytes], hidden: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = process_of(child.pid)
    if hidden == "descriptors":
        assert _without_descriptors(identity) == "None"
        return
    attribute, value = {"stat": ("_stat", None), "boot_id": ("_boot_id", ""), "pid_ns": ("_pid_name_space", "")}[hidden]
    monkeypatch.setattr(process, attribute, lambda *_: value)
    assert identity.is_alive() is None
    if hidden == "stat":
        child.kill()
        child.wait()
        assert identity.is_alive() is False  # the kernel says so without /proc


def _without_descriptors(identity: ProcessIdentity) -> str:
    """What a process says of another that can open no more files."""
    code = f"""
        import os
        import resource
        from flip_observability.process import ProcessIdentity
        identity = ProcessIdentity(**{identity.columns()!r})
        assert identity.is_alive() is True
        resource.setrlimit(resource.RLIMIT_NOFILE, (16, 16))
        try:
            while True:
                os.dup(2)
        except OSError:
            print(identity.is_alive())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_an_identity_that_was_never_read_is_no_death(child: subprocess.Popen[bytes]) -> None:
    identity = process_of(child.pid)
    assert dataclasses.replace(identity, start_ticks=0).is_alive() is None
    assert dataclasses.replace(identity, boot_id="").is_alive() is None
    assert dataclasses.replace(identity, pid_ns="").is_alive() is None


@pytest.mark.parametrize("pid", [0, -1, 2**40, "1", None, "../1"])
def test_nonsense_is_no_process(pid: object) -> None:
    identity = dataclasses.replace(current_process(), pid=pid)  # type: ignore[arg-type]
    assert identity.is_alive() is False


def test_a_command_of_any_name_can_be_looked_at(tmp_path: Path) -> None:
    program = tmp_path / "a) Z 1 (python\n"
    program.symlink_to(sys.executable)
    with subprocess.Popen([program, "-c", "input()"], stdin=subprocess.PIPE) as child:
        wait_for(lambda: "python" in os.readlink(f"/proc/{child.pid}/exe"))
        assert process_of(child.pid).is_alive_as_job() is True
        child.kill()
