"""Packets are dropped on the way to the hub: nothing says no, and nothing answers."""

from __future__ import annotations

import contextlib
import os
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from drills.deaths import UPLOADED
from drills.hub import phases, wait_for_final
from drills.judge import DELAY_SECONDS, Drill, Run, Skip
from drills.stage import Stage

GROUP = "network"


@dataclass(frozen=True)
class Wire:
    """A network of two: this machine, where the hub is, and a name space, where the server is.

    Args:
        space: name of the other network.
        here, there: the addresses.
    """

    space: str
    here: str
    there: str

    def cut(self) -> None:
        """Drop all packets to the other end: requests arrive, and their answers do not."""
        _ip("route", "add", "blackhole", f"{self.there}/32")

    def mend(self) -> None:
        """Let packets through again."""
        _ip("route", "del", "blackhole", f"{self.there}/32")


@contextlib.contextmanager
def wire() -> Iterator[Wire]:
    """Lay a wire for as long as the context lasts.

    Raises:
        Skip: this machine, or this user, cannot.
    """
    name = f"fd{uuid.uuid4().hex[:8]}"
    # A block of four addresses for each process, so that drills can be played at the same time.
    block = f"10.213.{os.getpid() >> 6 & 255}"
    first = (os.getpid() & 63) * 4
    line = Wire(name, f"{block}.{first + 1}", f"{block}.{first + 2}")
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.CalledProcessError):
        raise Skip("needs network name spaces, which only root can make") from None
    try:
        _ip("link", "add", f"{name}h", "type", "veth", "peer", "name", f"{name}s", "netns", name)
        _ip("addr", "add", f"{line.here}/30", "dev", f"{name}h")
        _ip("link", "set", f"{name}h", "up")
        _ip("-n", name, "addr", "add", f"{line.there}/30", "dev", f"{name}s")
        for device in ("lo", f"{name}s"):
            _ip("-n", name, "link", "set", device, "up")
        yield line
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            line.mend()
        _ip("netns", "del", name)  # and the wire with it


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def dropped(stage: Stage) -> Sequence[Run]:
    """Packets are dropped before END_RUN, in the midst of it, and after it."""
    with wire() as line:
        results = stage.home / "results"
        results.mkdir()
        site = stage.small(host=line.here, network=line.space, results=results)
        runs = phases(site, lambda _: line.cut(), lambda _: line.mend(), deaf=False)
        for run in runs:
            wait_for_final(run, DELAY_SECONDS)
        return runs


def dropped_in_a_call(stage: Stage) -> Sequence[Run]:
    """The wire is cut while a call is under way: its connection stands, and nothing comes."""
    with wire() as line:
        results = stage.home / "results"
        results.mkdir()
        site = stage.small(host=line.here, network=line.space, results=results)
        site.observer()
        job = site.job().begin().train(2)
        site.hub.hang()
        job.train()
        job.tell("end", False)
        site.hub.wait(lambda hub: any(record.code == 0 for record in hub.records), 20)
        line.cut()
        site.hub.heal()
        took = float(job.answer())
        job.leave()
        stage.notes.append(f"END_RUN took {took:.1f} s")
        line.mend()
        run = job.run()
        wait_for_final(run, DELAY_SECONDS)
        return [run]


DRILLS: tuple[Drill, ...] = (
    Drill("network-dropped", GROUP, "packets to the server are dropped", dropped, UPLOADED, True),
    Drill("network-in-a-call", GROUP, "packets are dropped in the midst of a call", dropped_in_a_call, UPLOADED, True),
)
