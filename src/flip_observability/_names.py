"""Names in a results archive: read alike by every extractor, and no two of them the same."""

from __future__ import annotations

import unicodedata

_DIRECTION_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They show a name in another order than it has: `exe.fdp` as `pdf.exe`."""
_CATEGORIES = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Control characters, bytes that are no UTF-8, and what ends a line."""
_MAX_STEP = 255
"""Characters of a step that had to be changed; what is longer is cut, as it is three times as long as on the disk."""


class Names:
    """Gives every path of a run directory its name in the archive.

    What an extractor or a terminal on another system could misread is written as ``%XX``: backslashes, control and
    direction characters, bytes that are no UTF-8. A name that this makes equal to another one gets ``%`` behind it.
    """

    def __init__(self) -> None:
        self._shown: dict[str, str] = {}
        self._taken: set[str] = set()

    def of(self, path: str) -> str:
        """The name of a path, which ends in ``/`` when it is a folder's. The same path gets the same name again."""
        raw = shown = ""
        for step in path.removesuffix("/").split("/"):
            raw += step
            shown = self._name(raw, shown + _readable(step))
            raw, shown = f"{raw}/", f"{shown}/"
        return shown if path.endswith("/") else shown[:-1]

    def _name(self, raw: str, wanted: str) -> str:
        known = self._shown.get(raw)
        if known is None:
            while wanted in self._taken:
                wanted += "%"
            self._taken.add(wanted)
            known = self._shown[raw] = wanted
        return known


def _readable(step: str) -> str:
    if step.isascii() and step.isprintable() and "\\" not in step:
        return step
    if not any(map(_is_misleading, step)):
        return step
    return "".join(_escaped(char) if _is_misleading(char) else char for char in step)[:_MAX_STEP]


def _is_misleading(char: str) -> bool:
    return char == "\\" or char in _DIRECTION_MARKS or unicodedata.category(char) in _CATEGORIES


def _escaped(char: str) -> str:
    is_byte = "\udc80" <= char <= "\udcff"  # as Python holds a byte of a file's name that is no UTF-8
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass"))
