"""What is a model id and its one canonical spelling, how a text from outside can be shown, how a folder is made."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

MAX_TEXT = 200
"""Characters shown of one text from outside: a 10 kB client name must not fill a screen or a log."""


def safe_text(value: object, limit: int = MAX_TEXT) -> str:
    """A text from outside, for a terminal or a log: one line, nothing that either would obey, bounded.

    Args:
        value: anything; its text is what counts.
        limit: characters of it that are kept. What is no printable character is spelled out, so it can become longer.
    """
    text = str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def make_private_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, for their owner alone, whatever the umask is.

    ``mkdir(parents=True)`` gives its mode to the last one only. A folder that exists keeps the mode that it has.

    Raises:
        OSError: it cannot be made.
    """
    if not folder.parent.exists():
        make_private_folder(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)


def canonical_uuid(value: Any) -> str | None:
    """Give the lower-case, hyphenated spelling of a UUID: the only one that is sent or stored.

    Args:
        value: Anything; its text is what counts. Upper case, braces, ``urn:uuid:`` and missing hyphens are accepted.

    Returns:
        The canonical spelling, or None when the value is no UUID (nothing is raised, whatever the value is).
    """
    try:
        return str(uuid.UUID(str(value)))
    except Exception:  # noqa: BLE001 - `str()` of a foreign object can raise anything, and then it is no UUID either
        return None


def is_valid_uuid(value: Any) -> bool:
    """Say whether :func:`canonical_uuid` has an answer for this value."""
    return canonical_uuid(value) is not None


def is_canonical_uuid(value: Any) -> bool:
    """Say whether a value is a text in the one spelling that :func:`canonical_uuid` gives, and so safe to paste."""
    return isinstance(value, str) and canonical_uuid(value) == value


def is_string_empty(value: Any) -> bool:
    """Say whether a value is None or holds nothing but white space. What is no text at all counts as empty."""
    return not isinstance(value, str) or not value.strip()


def printable(text: str, limit: int) -> str:
    """Somebody else's text, fit for a line of a log: cut, and its control characters and the like written out."""
    shown = text if len(text) <= limit else f"{text[:limit]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in shown)


class Utils:
    """The functions of this module under the name that FLIP's code calls them by."""

    canonical_uuid = staticmethod(canonical_uuid)
    is_valid_uuid = staticmethod(is_valid_uuid)
    is_string_empty = staticmethod(is_string_empty)
