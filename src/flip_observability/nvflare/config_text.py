"""Editing NVFLARE's configuration files as text, in the three forms that it reads, and checking what came of it.

Only the characters that must change are changed: indentation, order, comments and line ends stay. Nothing here has to
be believed, because the caller reads the new text with the form's own parser and compares all of it with what it wants.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import yaml
from nvflare.fuel.utils.config import ConfigFormat

PATH_KEYS = ("path", "class_path")
MAX_BYTES = 8 * 1024 * 1024


class ConfigTextError(Exception):
    """The text is not understood. The message says why and quotes nothing of the file."""


class Span(NamedTuple):
    """A stretch of the text."""

    start: int
    end: int


class Scalar(NamedTuple):
    """The value of a ``path`` in the text, and the stretch that spells it, quotes included."""

    span: Span
    value: str


@dataclass(frozen=True)
class Array:
    """A list in the text: from bracket to bracket, and its items with the comments right above them."""

    span: Span
    items: tuple[Span, ...]


def decode(content: bytes) -> str:
    """The text of a configuration file.

    Raises:
        ConfigTextError: too large, not UTF-8, or with a byte order mark (NVFLARE cannot read those).
    """
    if len(content) > MAX_BYTES:
        raise ConfigTextError(f"it is larger than {MAX_BYTES // 1024 // 1024} MiB")
    if content.startswith(b"\xef\xbb\xbf"):
        raise ConfigTextError("it begins with a byte order mark, which NVFLARE does not read: save it as plain UTF-8")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigTextError("it is not UTF-8") from None


def parse(text: str, form: ConfigFormat) -> dict[str, Any]:
    """What the text means.

    Raises:
        ConfigTextError: its form's parser does not take it, or it is no object.
    """
    try:
        content = _PARSERS[form](text)
    except ConfigTextError:
        raise
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigTextError(f"it is no valid {_NAMES[form]}{_where(error)}") from None
    except RecursionError:
        raise ConfigTextError("it is nested too deeply") from None
    except Exception as error:  # noqa: BLE001 - pyhocon raises what its parser raises
        raise ConfigTextError(f"it is no valid {_NAMES[form]} ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise ConfigTextError("it holds no object")
    return content


def same(one: Any, other: Any) -> bool:
    """Whether two parsed contents are the same down to types and the order of keys."""
    return repr(one) == repr(other)


def component_paths(text: str, form: ConfigFormat) -> list[Scalar]:
    """All values of ``path`` and ``class_path`` in the text."""
    return list(_yaml_paths(_yaml_root(text), text) if form is ConfigFormat.OMEGACONF else _bracket_paths(text))


def replace_paths(text: str, form: ConfigFormat, names: dict[str, str]) -> str:
    """Give components other class paths, where ``names`` has one for theirs."""
    spelled = dict.fromkeys(component_paths(text, form))  # YAML can refer to one place from several
    for scalar in sorted(spelled, reverse=True):
        if scalar.value in names:
            old = text[scalar.span.start : scalar.span.end]
            quote = old[0] if old[0] in "\"'" else ""
            text = f"{text[: scalar.span.start]}{quote}{names[scalar.value]}{quote}{text[scalar.span.end :]}"
    return text


def array(text: str, form: ConfigFormat, key: str) -> Array | None:
    """The list that is the value of a top-level key; None when it is not found as one."""
    return _yaml_array(text, key) if form is ConfigFormat.OMEGACONF else _bracket_array(text, key)


def move_last(text: str, found: Array, index: int) -> str:
    """Put one item of a list behind all others: the items change places, what stands between them stays."""
    order = [*(i for i in range(len(found.items)) if i != index), index]
    pieces, at = [], 0
    for place, item in zip(found.items, order, strict=True):
        pieces += [text[at : place.start], text[slice(*found.items[item])]]
        at = place.end
    return "".join(pieces) + text[at:]


def append(text: str, found: Array, values: Sequence[Any]) -> str:
    """Put values behind the items of a bracketed list, spelled and indented as its neighbours are."""
    newline, (opening, closing) = newline_of(text), found.span
    outer = _indent_at(text, opening)
    if not found.items:
        inner = outer + _step(text)
        items = f",{newline}{inner}".join(_spell(value, inner, text) for value in values)
        return f"{text[: opening + 1]}{newline}{inner}{items}{newline}{outer}{text[closing - 1 :]}"
    last = found.items[-1]
    if text.find("\n", opening, last.end) < 0 and all(isinstance(value, str) for value in values):
        between, inner = ", ", outer  # all on one line, and short
    else:
        inner = _indent_at(text, last.start)
        between = f",{newline}{inner}"
    added = "".join(between + _spell(value, inner, text) for value in values)
    return text[: last.end] + added + text[last.end :]


def remove_item(text: str, found: Array, index: int) -> str:
    """Take an item out of a bracketed list, with the comma that parted it from its neighbours."""
    items = found.items
    if len(items) == 1:
        return text[: found.span.start + 1] + text[found.span.end - 1 :]
    if index:
        return text[: items[index - 1].end] + text[items[index].end :]
    return text[: items[0].start] + text[items[1].start :]


def prepend_member(text: str, key: str, value: Any) -> str:
    """Put a member at the beginning of the text's outermost object.

    Raises:
        ConfigTextError: the text has no braces around it.
    """
    tokens = [token for token in _tokens(text) if token.kind not in ("space", "comment")]
    if not tokens or tokens[0].text != "{":
        raise ConfigTextError("it has no braces around it")
    opening, following = tokens[0].end, tokens[1]
    newline, inner = newline_of(text), _step(text)
    comma = "" if following.text == "}" else ","
    member = f"{newline}{inner}{json.dumps(key)}: {_spell(value, inner, text)}{comma}"
    if "\n" not in text[opening : following.start]:
        member += newline + (inner if comma else "")
    return text[:opening] + member + text[opening:]


def newline_of(text: str) -> str:
    """The line end that a text uses."""
    return "\r\n" if "\r\n" in text else "\n"


# -- JSON and HOCON: brackets ----------------------------------------------------------------------------------------


class _Token(NamedTuple):
    kind: str
    start: int
    end: int
    text: str


_TOKEN = re.compile(
    r'(?P<string>"""(?:.|\n)*?"{3,}|"(?:\\.|[^"\\\n])*")'
    r"|(?P<comment>\#[^\n]*|//[^\n]*)"
    r"|(?P<space>\s+)"
    r"|(?P<mark>[{}\[\],:=])"
    r'|(?P<word>(?:[^\s"\#{}\[\],:=/]|/(?!/))+)'
)


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise ConfigTextError(f"a string in line {text.count(chr(10), 0, at) + 1} has no end")
        yield _Token(match.lastgroup, match.start(), match.end(), match[0])
        at = match.end()


def _meaningful(text: str) -> list[_Token]:
    return [token for token in _tokens(text) if token.kind not in ("space", "comment")]


def _value_of(token: _Token) -> str:
    if token.kind == "string" and not token.text.startswith('"""'):
        try:
            return str(json.loads(token.text))
        except ValueError:
            return token.text[1:-1]
    return token.text.strip('"') if token.kind == "string" else token.text


def _bracket_paths(text: str) -> Iterator[Scalar]:
    tokens = _meaningful(text)
    for key, mark, value in zip(tokens, tokens[1:], tokens[2:], strict=False):
        if mark.text in (":", "=") and value.kind in ("string", "word") and _value_of(key) in PATH_KEYS:
            yield Scalar(Span(value.start, value.end), _value_of(value))


def _bracket_array(text: str, key: str) -> Array | None:
    tokens = _meaningful(text)
    top = 1 if tokens and tokens[0].text == "{" else 0  # HOCON may go without the outermost braces
    depth = 0
    for index, (name, mark, opening) in enumerate(zip(tokens, tokens[1:], tokens[2:], strict=False)):
        depth += _depth_change(name)
        named = depth == top and name.kind in ("string", "word") and _value_of(name) == key
        if named and mark.text in (":", "=") and opening.text == "[":
            return _items(text, tokens[index + 2 :])
    return None


def _depth_change(token: _Token) -> int:
    return {"{": 1, "[": 1, "}": -1, "]": -1}.get(token.text, 0) if token.kind == "mark" else 0


def _items(text: str, tokens: Sequence[_Token]) -> Array:
    """The items of a list whose opening bracket is the first token: bracketed groups, strings and words."""
    items: list[Span] = []
    depth, begin, floor = 0, 0, tokens[0].end
    for token in tokens:
        change = _depth_change(token)
        if depth == 1 and change >= 0 and token.text != ",":
            begin = token.start
        depth += change
        if depth == 0:
            return Array(Span(tokens[0].start, token.end), tuple(items))
        if depth == 1 and token.text != "," and token.start >= floor:
            items.append(Span(_with_comments(text, floor, begin), token.end))
            floor = token.end
    raise ConfigTextError("a list has no end")


def _with_comments(text: str, floor: int, start: int) -> int:
    """Where the comment lines right above an item begin, or the item itself."""
    line = text.rfind("\n", floor, start)
    if line < 0 or text[line:start].strip():
        return start
    while (above := text.rfind("\n", floor, line)) >= 0:
        content = text[above + 1 : line]
        if not content.lstrip().startswith(("#", "//")):
            break
        start, line = above + 1 + len(content) - len(content.lstrip()), above
    return start


def _indent_at(text: str, position: int) -> str:
    line = text[text.rfind("\n", 0, position) + 1 : position]
    return line[: len(line) - len(line.lstrip())]


def _step(text: str) -> str:
    """One level of indentation: that of the first line that has any."""
    match = re.search(r"\n([ \t]+)\S", text)
    return match[1] if match else "  "


def _spell(value: Any, indent: str, text: str) -> str:
    """A value as JSON, over several lines and indented like the rest, in the text's own line ends."""
    lines = json.dumps(value, indent=_step(text), ensure_ascii=False).split("\n")
    return (newline_of(text) + indent).join(lines)


# -- YAML ------------------------------------------------------------------------------------------------------------


def _yaml_root(text: str) -> Any:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigTextError(f"it is no valid YAML{_where(error)}") from None


def _yaml_paths(node: Any, text: str) -> Iterator[Scalar]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _yaml_paths(item, text)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(value, yaml.ScalarNode) and key.value in PATH_KEYS:
                yield Scalar(Span(value.start_mark.index, value.end_mark.index), value.value)
            else:
                yield from _yaml_paths(value, text)


def _yaml_array(text: str, key: str) -> Array | None:
    root = _yaml_root(text)
    members = root.value if isinstance(root, yaml.MappingNode) else []
    node = next((value for name, value in members if name.value == key), None)
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        return None
    span = Span(node.start_mark.index, node.end_mark.index)
    if node.flow_style:
        return Array(span, tuple(Span(item.start_mark.index, item.end_mark.index) for item in node.value))
    starts = [_dash(text, item.start_mark.index) for item in node.value]
    floors = [span.start, *starts]
    begins = [_with_comments(text, floor, start) for floor, start in zip(floors, starts, strict=False)]
    ends = [*begins[1:], span.end]
    return Array(span, tuple(Span(start, _end(text, start, end)) for start, end in zip(begins, ends, strict=True)))


def _dash(text: str, position: int) -> int:
    return text.rfind("-", 0, position)


def _end(text: str, start: int, end: int) -> int:
    """Where an item's own text ends: before what follows it, be it blank or a comment."""
    lines = text[start:end].splitlines(keepends=True)
    while len(lines) > 1 and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    return start + len("".join(lines).rstrip())


# -- parsers ---------------------------------------------------------------------------------------------------------


def _where(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark is not None else line
    return f" (line {line})" if line else ""


def _no_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ConfigTextError("a key stands twice in one object")
    return members


def _parse_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_no_twice)


def _parse_hocon(text: str) -> Any:
    from nvflare.fuel_opt.utils.pyhocon_loader import PyhoconLoader

    tokens = _meaningful(text)
    for word, following in itertools.pairwise(tokens):
        if word.kind == "word" and word.text == "include" and following.kind != "mark":
            raise ConfigTextError("it includes other files, and what stands in those cannot be changed from here")
    return PyhoconLoader().load_config_from_str(text).to_dict()


def _parse_yaml(text: str) -> Any:
    return yaml.safe_load(text)


_PARSERS = {
    ConfigFormat.JSON: _parse_json,
    ConfigFormat.PYHOCON: _parse_hocon,
    ConfigFormat.OMEGACONF: _parse_yaml,
}
_NAMES = {ConfigFormat.JSON: "JSON", ConfigFormat.PYHOCON: "HOCON", ConfigFormat.OMEGACONF: "YAML"}
