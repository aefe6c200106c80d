"""Changing a FLIP job's server configuration to this package's components, and back."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvflare.fuel.utils.config import ConfigFormat
from nvflare.fuel.utils.config_factory import ConfigFactory

from flip_observability import editing
from flip_observability.editing import Edit, EditError
from flip_observability.nvflare import components, config_text
from flip_observability.nvflare.config_text import PATH_KEYS, ConfigTextError

SERVER_CONFIG = "config_fed_server.json"
OURS = "flip_observability.nvflare.components"
FLIPS = "flip.nvflare.components"
HANDLER, PERSIST, GENERATOR = "ServerEventHandler", "PersistToS3AndCleanup", "ValidationJsonGenerator"

_MODULES = {
    HANDLER: ("flip_server_event_handler", "server_event_handler"),
    PERSIST: ("persist_and_cleanup", "persist_to_s3_and_cleanup"),
    GENERATOR: ("validation_json_generator", "validation_json_generator"),
    "EvaluationJsonGenerator": ("evaluation_json_generator", "evaluation_json_generator"),
}
"""Our components, and the module that each one is in, in FLIP and here: jobs made by recipes name it as well."""

TO_OURS = {
    path: f"{OURS}.{name}"
    for name, (module, _) in _MODULES.items()
    for package in (FLIPS, "flip.components")
    for path in (f"{package}.{name}", f"{package}.{module}.{name}")
}
CLASS_OF = {
    path: name for name, (_, module) in _MODULES.items() for path in (f"{OURS}.{name}", f"{OURS}.{module}.{name}")
}
TO_FLIPS = {path: f"{FLIPS}.{name}" for path, name in CLASS_OF.items()}

_FLIP_PACKAGE = re.compile(r"\bflip\.(?:nvflare\.)?components\b")
_OFFERED = {"FlipEvents", "ModelStatus", "FlipMetaKey", "FlipMetricsLabel"}
_MAX_SOURCES, _MAX_SOURCE_BYTES = 2_000, 1024 * 1024


class AdoptError(Exception):
    """The job is not changed. The text is one line for the user, with the reason."""


@dataclass(frozen=True)
class FilePlan:
    """One configuration file: what it holds and what it would hold, and what to say of it."""

    path: Path
    before: str
    after: str
    edit: Edit
    notes: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        """Whether anything is to be done."""
        return self.edit.before != self.edit.after or self.edit.restore is not None or bool(self.edit.discard)


@dataclass(frozen=True)
class _Config:
    path: Path
    form: ConfigFormat
    content: bytes
    text: str
    data: dict[str, Any]


def plan(job: Path, *, add: bool = False, persistor_id: str = "") -> list[FilePlan]:
    """Find out what adopting a job would change.

    Args:
        job: the job's folder, or one app's.
        add: add our components to an app that has none of FLIP's.
        persistor_id: with ``add``, the id of the component that persists the model; by default ``persistor``.

    Raises:
        AdoptError: there is something that is not understood, or nothing to adopt.
        EditError: a file cannot be read, or lies outside of the job.
    """
    plans, plain = [], []
    for config in _configs(job):
        try:
            after, notes = _adopted(config, add=add, persistor_id=persistor_id)
        except ConfigTextError as error:
            raise AdoptError(f"{config.path} is not changed: {error}") from None
        if after is None:
            plain.append(config.path)
            continue
        notes += _notes_on_code(config.path, job)
        edit = Edit(config.path, config.content, after.encode(), keep=after != config.text)
        if edit.keep:
            edit = Edit(edit.path, edit.before, edit.after, keep=True, discard=_stale(config, edit.after))
        plans.append(FilePlan(config.path, config.text, after, edit, tuple(notes)))
    if plain:
        raise AdoptError(
            f"{plain[0]} has no components of FLIP's: nothing to adopt. --add puts {HANDLER}, {PERSIST} and "
            f"{GENERATOR} of this package into it"
        )
    return plans


def plan_undo(job: Path) -> list[FilePlan]:
    """Find out what undoing the adoption of a job would change: the kept original where nobody has edited the file
    since, otherwise the class paths alone.

    Raises:
        AdoptError: there is something that is not understood.
        EditError: a file cannot be read, or lies outside of the job.
    """
    return [_undone(config) for config in _configs(job)]


def apply(plans: list[FilePlan]) -> None:
    """Do what was planned, in all files or in none.

    Raises:
        EditError: nothing was changed, with the reason.
    """
    editing.apply([file.edit for file in plans if file.changes])


# -- finding ---------------------------------------------------------------------------------------------------------


def _configs(job: Path) -> list[_Config]:
    if not job.is_dir():
        raise AdoptError(f"{job} is {'no folder: unpack the job first' if job.exists() else 'not there'}")
    folders = [job / "config", *sorted(folder / "config" for folder in job.iterdir() if folder.is_dir())]
    found: dict[Path, _Config] = {}
    for folder in folders:
        form, name = ConfigFactory.search_config_format(SERVER_CONFIG, [str(folder)])
        if form is None or name is None:
            continue
        path = editing.real_path(Path(name), job)
        if path not in found:
            found[path] = _load(path, form)
    if not found:
        raise AdoptError(
            f"{job} is no NVFLARE job: there is no <app>/config/config_fed_server.json, .conf or .yml in it"
        )
    return list(found.values())


def _load(path: Path, form: ConfigFormat) -> _Config:
    content = editing.read(path) or b""
    try:
        text = config_text.decode(content)
        return _Config(path, form, content, text, config_text.parse(text, form))
    except ConfigTextError as error:
        raise AdoptError(f"{path} is not understood: {error}") from None


def _stale(config: _Config, after: bytes | None) -> tuple[Path, ...]:
    """Originals of an earlier adoption; the file has been made anew since."""
    mine = editing.backup_name(config.path, after or b"")
    return tuple(file for file in editing.originals(config.path) if file != mine)


# -- changing --------------------------------------------------------------------------------------------------------


def _adopted(config: _Config, *, add: bool, persistor_id: str) -> tuple[str | None, list[str]]:
    text = config_text.replace_paths(config.text, config.form, TO_OURS)
    data = _renamed(config.data, TO_OURS)
    added: list[str] = []
    if not any(path in CLASS_OF for path in _paths(data)):
        _refuse_hidden(data)
        if not add:
            return None, []
        text, data, added = _with_ours(config, persistor_id)
    _verify(text, config.form, data)
    text, data = _handler_last(text, config.form, data)
    _verify(text, config.form, data)
    _check_arguments(data)
    return text, [*added, *_notes_on(data)]


def _verify(text: str, form: ConfigFormat, wanted: dict[str, Any]) -> None:
    try:
        right = config_text.same(config_text.parse(text, form), wanted)
    except ConfigTextError:
        right = False
    if not right:
        raise ConfigTextError(
            "its class paths cannot be changed without touching something else (are they composed or referred to?)"
        )


def _handler_last(text: str, form: ConfigFormat, data: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Put the handler behind all other components, so that it hears of an event after they have handled it."""
    listed = data.get("components")
    listed = listed if isinstance(listed, list) else []
    places = [index for index, item in enumerate(listed) if _class_of(item) == HANDLER]
    everywhere = sum(CLASS_OF.get(path) == HANDLER for path in _paths(data))
    if everywhere != len(places):
        raise ConfigTextError(f"it has a {HANDLER} that is not in its list of components")
    if len(places) > 1:
        raise ConfigTextError(f"it has {len(places)} components {HANDLER}, and one run has one")
    if not places or places[0] == len(listed) - 1:
        return text, data
    found = config_text.array(text, form, "components")
    if found is None or len(found.items) != len(listed):
        raise ConfigTextError(f"its list of components is written in an unusual way: put {HANDLER} last by hand")
    order = [item for index, item in enumerate(listed) if index != places[0]] + [listed[places[0]]]
    return config_text.move_last(text, found, places[0]), {**data, "components": order}


def _with_ours(config: _Config, persistor_id: str) -> tuple[str, dict[str, Any], list[str]]:
    """Add our components to an app that has none of FLIP's."""
    if config.form is ConfigFormat.OMEGACONF:
        raise ConfigTextError("components are added to JSON and HOCON only: write them into this YAML by hand")
    listed = config.data.get("components", [])
    if not isinstance(listed, list):
        raise ConfigTextError("its components are no list")
    ids = {item.get("id"): item for item in listed if isinstance(item, dict)}
    new = _new_components(ids, persistor_id or "persistor")
    text = config.text
    if "components" not in config.data:
        text = config_text.prepend_member(text, "components", new)
        data: dict[str, Any] = {"components": new, **config.data}
    else:
        found = config_text.array(text, config.form, "components")
        if found is None:
            raise ConfigTextError("its list of components is written in an unusual way: add to it by hand")
        text = config_text.append(text, found, new)
        data = {**config.data, "components": [*listed, *new]}
    return text, data, [f"added: {', '.join(str(item['id']) for item in new)}"]


def _new_components(ids: Mapping[Any, Any], persistor_id: str) -> list[dict[str, Any]]:
    if persistor_id not in ids:
        known = ", ".join(sorted(str(name) for name in ids if name)) or "none"
        raise ConfigTextError(
            f"it has no component '{persistor_id}' that would know where the model is; --persistor names another one "
            f"(components: {known})"
        )
    new = [
        {"id": "json_generator", "path": f"{OURS}.{GENERATOR}", "args": {}},
        {"id": "persist_and_cleanup", "path": f"{OURS}.{PERSIST}", "args": {"persistor_id": persistor_id}},
        {"id": "flip_server_event_handler", "path": f"{OURS}.{HANDLER}", "args": {}},
    ]
    if str((ids.get("json_generator") or {}).get("path", "")).endswith("JsonGenerator"):
        new = new[1:]  # NVFLARE's own writes the same file
    taken = [str(item["id"]) for item in new if item["id"] in ids]
    if taken:
        raise ConfigTextError(f"it has components with the ids that ours need: {', '.join(taken)}")
    return new


def _undone(config: _Config) -> FilePlan:
    kept = editing.original(config.path, config.content)
    if kept is not None and kept.untouched:
        content = editing.read(kept.path) or b""
        others = tuple(file for file in editing.originals(config.path) if file != kept.path)
        edit = Edit(config.path, config.content, content, restore=kept.path, discard=others)
        return FilePlan(config.path, config.text, content.decode(), edit)
    after = config_text.replace_paths(config.text, config.form, TO_FLIPS)
    try:
        _verify(after, config.form, _renamed(config.data, TO_FLIPS))
    except ConfigTextError as error:
        where = f"; the original is {kept.path}" if kept else ""
        raise AdoptError(f"{config.path} is not changed back: {error}{where}") from None
    notes: tuple[str, ...] = ()
    if after != config.text:
        why = "it was edited since it was adopted" if kept else "there is no original beside it"
        notes = (f"{why}: class paths are changed back, everything else stays",)
    edit = Edit(config.path, config.content, after.encode(), discard=editing.originals(config.path))
    return FilePlan(config.path, config.text, after, edit, notes)


# -- reading ---------------------------------------------------------------------------------------------------------


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_renamed(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: names.get(item, item) if key in PATH_KEYS and isinstance(item, str) else _renamed(item, names)
        for key, item in value.items()
    }


def _nodes(value: Any) -> Iterator[Any]:
    yield value
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for child in children:
        yield from _nodes(child)


def _paths(data: Any) -> list[str]:
    return [
        node[key]
        for node in _nodes(data)
        if isinstance(node, dict)
        for key in PATH_KEYS
        if isinstance(node.get(key), str)
    ]


def _class_of(component: Any) -> str | None:
    if not isinstance(component, dict):
        return None
    paths = [component.get(key) for key in PATH_KEYS]  # anything, where an argument of a component has such a name
    return next((CLASS_OF[path] for path in paths if isinstance(path, str) and path in CLASS_OF), None)


def _refuse_hidden(data: Any) -> None:
    """Class paths that are made of variables could be FLIP's: NVFLARE knows when the job runs, and not we."""
    mentioned = any(isinstance(node, str) and _FLIP_PACKAGE.search(node) for node in _nodes(data))
    composed = [path for path in _paths(data) if "{" in path or "$" in path]
    if mentioned and composed:
        raise ConfigTextError("it composes class paths of variables: write FLIP's class paths out in full")


def _check_arguments(data: Any) -> None:
    """Refuse what our classes would not take: the run would find out only when it starts."""
    for node in _nodes(data):
        name = _class_of(node)
        if name is None:
            continue
        args = node.get("args") or {}
        known = set(inspect.signature(getattr(components, name)).parameters)
        unknown = sorted(map(str, args.keys() - known)) if isinstance(args, dict) else ["(no object)"]
        if unknown:
            raise ConfigTextError(f"its {name} has arguments that ours does not know: {', '.join(unknown)}")


def _notes_on(data: dict[str, Any]) -> list[str]:
    notes = []
    left = sorted({path for path in _paths(data) if _FLIP_PACKAGE.match(path)})
    if left:
        notes.append(f"stay FLIP's, and need FLIP's package as before: {', '.join(left)}")
    listed = [item for item in data.get("components") or [] if isinstance(item, dict)]
    ids = {item.get("id") for item in listed}
    handler = next((item for item in listed if _class_of(item) == HANDLER), None)
    if handler is None:
        return [*notes, f"there is no {HANDLER}: nobody reports this app's statuses"]
    args = handler.get("args") or {}
    for argument in ("validation_json_generator_id", "persist_and_cleanup_id"):
        wanted = args.get(argument, inspect.signature(components.ServerEventHandler).parameters[argument].default)
        if wanted not in ids:
            notes.append(f"there is no component '{wanted}', which {HANDLER} will ask for: the run would fail")
    return notes


def _notes_on_code(config: Path, job: Path) -> list[str]:
    """What the app's own Python imports of FLIP's and could import from here; it works unchanged as well."""
    folder = config.parent
    while folder.name != "config" and folder not in (job.resolve(), folder.parent):
        folder = folder.parent
    custom = folder.parent / "custom"
    sources = sorted(custom.rglob("*.py"))[:_MAX_SOURCES] if custom.is_dir() else []
    notes = [f"custom/{file.relative_to(custom)}:{line} {what}" for file in sources for line, what in _imports(file)]
    if not sources:
        notes.append("no custom code: the server accepts our classes only after flip-obs install of its kit")
    return notes


def _imports(file: Path) -> Iterator[tuple[int, str]]:
    if file.is_symlink() or file.stat().st_size > _MAX_SOURCE_BYTES:
        return
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return  # not for us to judge
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module:
            continue
        names = {alias.name for alias in node.names}
        constants, classes = sorted(names & _OFFERED), sorted(names & _MODULES.keys())
        if constants and node.module.startswith("flip.constants"):
            yield (
                node.lineno,
                f"can import {', '.join(constants)} from flip_observability.constants; works as it is, too",
            )
        if classes and _FLIP_PACKAGE.match(node.module):
            yield node.lineno, f"uses FLIP's {', '.join(classes)}: import from {OURS} to have ours"


__all__ = ["AdoptError", "EditError", "FilePlan", "apply", "plan", "plan_undo"]
