"""What an adopted run has left at hub and bucket that FLIP's own has not, and the other way about."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from flip_runs import Outcome
from recording_hub import Call


class Difference(NamedTuple):
    """One thing that the two runs do not have in common.

    Attributes:
        where: ``hub`` or ``archive``.
        whose: ``FLIP`` when only FLIP's own run has it, ``ours`` when only the adopted one has it, ``both`` when its
            content differs.
        what: the call, or the archive's member.
    """

    where: str
    whose: str
    what: Call | str

    def __str__(self) -> str:
        return f"{self.where}, only {self.whose}: {self.what}" if self.whose != "both" else f"{self.where}: {self.what}"


ON_PURPOSE: Mapping[str, Mapping[Difference, str]] = {
    kind: {
        Difference("hub", "FLIP", ("status", status)): (
            "Each of the two phases announces itself as a whole run; a model's status goes forwards only"
        )
        for status in ("PREPARED", "RUNNING")
    }
    for kind in ("diffusion", "diffusion_as_it_is")
}
"""For each job type the differences that are meant to be, each once in a run, with the reason."""


def differences(kind: str, stock: Outcome, adopted: Outcome) -> list[str]:
    """What differs and is not meant to, in words. Empty when who adopts loses nothing and adds nothing."""
    found = [*_of_calls(stock, adopted), *_of_archives(stock, adopted)]
    return [str(item) for item in (Counter(found) - Counter(ON_PURPOSE.get(kind, {}).keys())).elements()]


def _of_calls(stock: Outcome, adopted: Outcome) -> list[Difference]:
    theirs, ours = Counter(stock.calls), Counter(adopted.calls)
    return [
        Difference("hub", whose, said)
        for whose, rest in (("FLIP", theirs - ours), ("ours", ours - theirs))
        for said in rest.elements()
    ]


def _of_archives(stock: Outcome, adopted: Outcome) -> list[Difference]:
    theirs, ours = stock.members, adopted.members
    found = [Difference("archive", "FLIP", name) for name in sorted(theirs.keys() - ours.keys())]
    found += [Difference("archive", "ours", name) for name in sorted(ours.keys() - theirs.keys())]
    for name in sorted(theirs.keys() & ours.keys()):
        if _content(name, theirs[name], stock) != _content(name, ours[name], adopted):
            found.append(Difference("archive", "both", name))
    return found


LOGS = re.compile(r"(log|error_log|audit|stats_pool|pool_stats)[^/]*(/.*)?")
"""Members that tell what happened when: there must be the same ones, and each run has its own in them."""


def _content(name: str, data: bytes, outcome: Outcome) -> Any:
    """What is to be the same: JSON whatever its layout, everything else byte by byte."""
    if LOGS.fullmatch(name):
        return None
    if name == "meta.json":  # holds the model's id, and on a server when and by whom the job was submitted
        return sorted(json.loads(data))
    if not name.endswith(".json"):
        return data
    content = json.loads(data.decode().replace(outcome.model_id, "MODEL"))
    # A list, as that of an evaluation's failures, has the order in which the sites happened to answer.
    return sorted(content, key=partial(json.dumps, sort_keys=True)) if isinstance(content, list) else content
