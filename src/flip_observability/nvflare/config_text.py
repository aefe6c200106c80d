"""Reading NVFLARE's configuration files in the three forms that it has, and changing little of their text.

A job may be a stranger's. JSON is read here, within a size. HOCON and YAML are read by a process of their own
(:mod:`flip_observability.nvflare.config_reader`) that cannot open anything and is ended when it takes long.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nvflare.fuel.utils.config import ConfigFormat

from flip_observability import editing
from flip_observability.editing import EditError

PATH_KEYS = ("path", "class_path")
DEADLINE_SECONDS = 20.0
"""For reading one file of HOCON or YAML; FLIP's take less than one."""
MAX_DEPTH = 64

_NAMES = {ConfigFormat.JSON: "JSON", ConfigFormat.PYHOCON: "HOCON", ConfigFormat.OMEGACONF: "YAML"}
# pyhocon knows its keyword in any case; upper case finds what it takes for one.
_INCLUDE = re.compile(r"(?<![A-Z0-9_$])INCLUDE(?![A-Z0-9_$])")
_CLASS_PATH = re.compile(r"""(?<![\w.-])((?:class_)?path["']?\s*[:=]\s*["']{0,3})([A-Za-z_][\w.]*)(?![\w.])""")
_SPACE = re.compile(r"[ \t\r\n]*")
_READER = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {0}; {0}.main(sys.argv[2])".format(
    "flip_observability.nvflare.config_reader"
)


class ConfigTextError(Exception):
    """The text is not understood. The message says why and quotes nothing of the file."""


class Config(NamedTuple):
    """A configuration file as it was read: its bytes, its text, and what that means."""

    path: Path
    form: ConfigFormat
    content: bytes
    text: str
    data: dict[str, Any]

    def listed(self, key: str) -> list[Any]:
        """What the file lists under a key; an empty list where it has no such key.

        Raises:
            EditError: what it has there is no list.
        """
        listed = self.data.get(key, [])
        if not isinstance(listed, list):
            raise EditError(f"{self.path}: {key} is no list")
        return listed


def load(path: Path, form: ConfigFormat = ConfigFormat.JSON) -> Config:
    """Read a configuration file.

    Raises:
        EditError: it cannot be read, or is not understood.
    """
    content = editing.read(path) or b""
    with refusing(path, "is not understood"):
        if content.startswith(b"\xef\xbb\xbf"):
            raise ConfigTextError("it begins with a byte order mark, which NVFLARE does not read: save it without")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            raise ConfigTextError("it is not UTF-8") from None
        return Config(path, form, content, text, parse(text, form))


@contextlib.contextmanager
def refusing(path: Path, what: str) -> Iterator[None]:
    """Name the file in what is raised for its text."""
    try:
        yield
    except ConfigTextError as error:
        raise EditError(f"{path} {what}: {error}") from None


def parse(text: str, form: ConfigFormat) -> dict[str, Any]:
    """What the text means, without anything that it would fetch from elsewhere.

    Raises:
        ConfigTextError: its form's parser does not take it, it is no object, or it refers to other files or variables.
    """
    if form is ConfigFormat.PYHOCON:
        _refuse_references(text)
    content = _parse_json(text) if form is ConfigFormat.JSON else _read_elsewhere(text, form)
    if not isinstance(content, dict):
        raise ConfigTextError("it holds no object")
    if _is_deep(content):
        raise ConfigTextError("it is nested too deeply")
    return content


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_twice)
    except ValueError as error:
        line = getattr(error, "lineno", None)
        raise ConfigTextError(f"it is no valid JSON{f' (line {line})' if line else ''}") from None
    except RecursionError:
        raise ConfigTextError("it is nested too deeply") from None


def same(one: Any, other: Any) -> bool:
    """Whether two parsed contents are the same down to types and the order of keys."""
    return repr(one) == repr(other)


def replace_paths(text: str, names: Mapping[str, str]) -> str:
    """Give components other class paths, where ``names`` has one for theirs, in any of the three forms.

    What comes of it is to be parsed and compared: a text can hold something that looks like a class path.
    """
    return _CLASS_PATH.sub(lambda match: match[1] + names.get(match[2], match[2]), text)


def move_last(text: str, key: str, index: int) -> str:
    """Put one item of a list, a member of a JSON object, behind the others; what stands between them stays.

    Raises:
        ConfigTextError: the text is no JSON.
    """
    _parse_json(text)
    (begin,) = (start for name, start, _ in _members(text, 0) if name == key)
    places = [(start, end) for _, start, end in _members(text, begin)]
    order = [*places[:index], *places[index + 1 :], places[index]]
    pieces, at = [], 0
    for (start, end), item in zip(places, order, strict=True):
        pieces += [text[at:start], text[slice(*item)]]
        at = end
    return "".join(pieces) + text[at:]


def spelled_like(before: str, data: Any) -> str:
    """JSON with the indentation, the line ends and the end of another one."""
    step = re.search(r"\n([ \t]+)\S", before)
    indent = step[1] if step else 0 if "\n" in before.strip() else None
    ascii_only = before.isascii() or "\\ud" in before.lower()  # halves of characters can only be escaped
    after = json.dumps(data, indent=indent, ensure_ascii=ascii_only) + before[len(before.rstrip()) :].replace("\r", "")
    return after.replace("\n", "\r\n" if "\r\n" in before else "\n")


def _members(text: str, at: int) -> Iterator[tuple[str | None, int, int]]:
    """The members of the object or list that begins at a place in valid JSON: key, begin and end of the value."""
    decoder, at = json.JSONDecoder(), _skip(text, at)
    in_object = text[at] == "{"
    at = _skip(text, at + 1)
    while text[at] not in "}]":
        key = None
        if in_object:
            key, colon = decoder.raw_decode(text, at)
            at = _skip(text, _skip(text, colon) + 1)
        _, end = decoder.raw_decode(text, at)
        yield key, at, end
        at = _skip(text, end)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    space = _SPACE.match(text, at)
    return space.end() if space else at


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ConfigTextError("a key stands twice in one object")
    return members


def _is_deep(content: Any) -> bool:
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        children = (child for node in level for child in (node.values() if isinstance(node, dict) else node))
        level = [child for child in children if isinstance(child, dict | list)]
    return bool(level)


def _refuse_references(text: str) -> None:
    if _INCLUDE.search(text.upper()):
        raise ConfigTextError("it includes other files, or has that word: what stands in those is not looked at")
    if "${" in text:
        raise ConfigTextError("it refers to variables with ${…}, which are not looked up: write their values out")


def _read_elsewhere(text: str, form: ConfigFormat) -> Any:
    command = [sys.executable, "-I", "-c", _READER, json.dumps(sys.path), form.value]
    try:
        done = subprocess.run(
            command, input=text.encode(), capture_output=True, timeout=DEADLINE_SECONDS, check=False, env={}, cwd="/"
        )
    except subprocess.TimeoutExpired:
        raise ConfigTextError(f"it takes longer than {DEADLINE_SECONDS:.0f} s to read") from None
    try:
        answer = json.loads(done.stdout)
    except (ValueError, RecursionError):
        raise ConfigTextError(f"it is no {_NAMES[form]} that can be read with the memory there is") from None
    if "line" in answer:
        where = f" (line {answer['line']})" if answer["line"] else ""
        raise ConfigTextError(f"it is no valid {_NAMES[form]}{where}")
    return answer["content"]
