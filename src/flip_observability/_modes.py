"""Who else can get at the folders whose files are the server's alone, by their modes and owners."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

MAX_ENTRIES = 10_000
"""How many entries of one folder are looked at."""
_GROUP, _OTHERS = 0o070, 0o007
_WHO = {_OTHERS: "others", _GROUP | _OTHERS: "group or others"}


@dataclass(frozen=True)
class Private:
    """A folder that is not for everybody.

    Args:
        what: it is.
        folder: where it is. One that is not there is no complaint.
        is_for_group: whether its group may read and write there, and other users own what is in it.
    """

    what: str
    folder: Path
    is_for_group: bool = False

    def complaint(self) -> tuple[str, str] | None:
        """What is wrong, and what to do about it; None when nothing is. Links are not followed.

        A file counts as open when its folder lets those in for whom its own mode is open.

        Raises:
            OSError: it cannot be looked into.
        """
        if not self.folder.is_dir():
            return None
        top = self.folder.stat()
        owner = os.geteuid() or top.st_uid  # root looks at another user's folder
        reach = (_GROUP if top.st_mode & 0o010 else 0) | (_OTHERS if top.st_mode & 0o001 else 0)
        mask = _OTHERS if self.is_for_group else _GROUP | _OTHERS
        counts: Counter[str] = Counter()
        for info, within in ((top, mask), *((info, mask & reach) for info in _entries(self.folder))):
            counts["open"] += bool(not stat.S_ISLNK(info.st_mode) and info.st_mode & within)
            counts["foreign"] += not self.is_for_group and info.st_uid != owner
        table = (
            (counts["open"], f"open to {_WHO[mask]}", f"chmod -R {'o' if self.is_for_group else 'go'}= {self.folder}"),
            (counts["foreign"], "another user's", f"give {self.folder} to the server's user"),
        )
        wrong = [(f"{count} {how}", todo) for count, how, todo in table if count]
        if not wrong:
            return None
        said = f"{self.what} {self.folder} ({stat.S_IMODE(top.st_mode):04o}), folder and files: "
        return said + ", ".join(text for text, _ in wrong), "; ".join(todo for _, todo in wrong)


def _entries(folder: Path) -> Iterator[os.stat_result]:
    with os.scandir(folder) as entries:
        for entry in islice(entries, MAX_ENTRIES):
            try:
                yield entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # noqa: PERF203 - SQLite's own files come and go
                continue
