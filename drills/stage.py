"""Where drills are played: one shared NVFLARE site, small sites without a federation, what the judge asks."""

from __future__ import annotations

import contextlib
import random
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from drills.site import Site
from drills.small import SmallSite
from flip_observability.constants import FlareEvents
from flip_observability.ledger import FILE_NAME, Ledger, LedgerError


class Place(Protocol):
    """What the judge must see of a site."""

    ledger_dir: Path

    @property
    def secrets(self) -> list[str]:
        """What must be found nowhere."""

    def texts(self) -> Mapping[str, bytes]:
        """What was logged, served and told."""

    def unfinished_uploads(self) -> list[str]:
        """Keys of multipart uploads that nobody ended."""


class Shared:
    """What several drills use one after the other: a site whose start takes long.

    Args:
        home: an empty folder.
    """

    def __init__(self, home: Path) -> None:
        self._home = home
        self._stack = contextlib.ExitStack()
        self._site: Site | None = None

    def site(self) -> Site:
        """The site, with everything running."""
        if self._site is None:
            self._site = self._stack.enter_context(Site.running(self._home))
        self._site.ensure_running()
        return self._site

    def __enter__(self) -> Shared:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


class Stage:
    """One drill's view of the world; leave it when the drill has been judged.

    Args:
        shared: across drills.
        seed: of everything that is random.
        full: whether a drill that comes in two sizes is to be the big one.
    """

    def __init__(self, shared: Shared, seed: int, *, full: bool) -> None:
        self.rng = random.Random(seed)
        self.full = full
        self.notes: list[str] = []
        self._shared = shared
        self._stack = contextlib.ExitStack()
        self.home = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="flip-drill-")))
        self.times = self.home / "times"
        self.times.mkdir()
        self._places: list[Place] = []

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    # -- places ------------------------------------------------------------------------------------------------------

    def site(self) -> Site:
        """The shared site; what it was told by earlier drills is healed."""
        site = self._shared.site()
        self.times = site.times
        if site not in self._places:
            self._places.append(site)
            self._stack.callback(site.heal)
        return site

    def small(self, **options: Any) -> SmallSite:
        """A new small site, whose jobs start in a moment; options as for :class:`~drills.small.SmallSite`."""
        folder = self.home / f"small-{len(self._places)}"
        small = self._stack.enter_context(SmallSite(folder, self.times, **options))
        self._places.append(small)
        return small

    # -- for the judge -----------------------------------------------------------------------------------------------

    def persisted(self, job_id: str) -> int:
        """How many models a run persisted, as far as any ledger heard of it."""
        count = 0
        for place in self._places:
            with contextlib.suppress(LedgerError, ValueError), Ledger(place.ledger_dir, read_only=True) as ledger:
                names = [row["name"] for row in ledger.events(job_id)]
                count = max(count, names.count(FlareEvents.AFTER_LEARNABLE_PERSIST.value))
        return count

    def secret_in(self, data: bytes) -> bool:
        """Whether a secret is in it."""
        return any(secret.encode() in data for place in self._places for secret in place.secrets)

    def leaks(self) -> Iterable[str]:
        """Names of what holds a secret: ledgers, spools, logs, pages, and what the hub was told."""
        for place in self._places:
            for path in place.ledger_dir.glob("*"):
                if path.is_file() and self.secret_in(path.read_bytes()):
                    yield "the ledger" if path.name.startswith(FILE_NAME) else path.name
            yield from (name for name, text in place.texts().items() if self.secret_in(text))

    def keep(self, folder: Path) -> None:
        """Copy ledgers and logs, for whoever wants to know what went wrong."""
        for number, place in enumerate(self._places):
            kept = folder / str(number)
            shutil.copytree(place.ledger_dir, kept, dirs_exist_ok=True)
            for name, text in place.texts().items():
                (kept / f"{name.replace(' ', '-')}.txt").write_bytes(text)

    def unfinished_uploads(self) -> list[str]:
        """Keys of multipart uploads that nobody ended."""
        return [key for place in self._places for key in place.unfinished_uploads()]
