"""Changing a FLIP job's server configuration to this package's components, and back.

The job may be a stranger's: what it holds is read within limits, and its class paths are changed in the text as it
stands. What has come of it is parsed again, and must be what the job was but for those paths and the order of its
components; otherwise nothing is changed.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvflare.fuel.utils.config import ConfigFormat
from nvflare.fuel.utils.config_factory import ConfigFactory

from flip_observability import editing
from flip_observability.component_paths import CLASS_OF, GENERATOR, HANDLER, OURS, PERSIST, TO_FLIPS, TO_OURS
from flip_observability.editing import Edit, EditError, Plan
from flip_observability.nvflare import components, config_text
from flip_observability.nvflare.config_text import PATH_KEYS, Config, ConfigTextError

SERVER_CONFIG = "config_fed_server.json"
STAYS_FLIPS = frozenset(
    "CleanupImages ClientEventHandler ClientExceptionReporter EvaluationModelLocator FlipAnalyticsBridge "
    "FlipFedOptShareableGenerator InitialCheckpointPTModelPersistor InitialPTModelLocator KeepOnlyVars PTModelLocator "
    "PercentilePrivacy ReconstructFullModel ReconstructFullModelForEval StagePercentilePrivacy TrimBroadcastVars "
    "TrimEvalBroadcastVars".split()
)
"""FLIP's components that do nothing of what ours do. Any other one may report or upload what ours does, too."""

_OF_FLIPS = re.compile(r"\bflip\.(?:nvflare\.)?components\b")
_IMPORT = re.compile(rb"^\s*from\s+flip\.(?:nvflare\.)?components[\w.]*\s+import\b\s*(\([^)]*\)|[^#\n]*)", re.MULTILINE)
_MAX_SOURCES = 2_000


def plan(job: Path, *, add: bool = False, persistor_id: str = "") -> Plan:
    """Find out what adopting a job would change.

    Args:
        job: the job's folder, or one app's.
        add: add our components to an app that has none of FLIP's.
        persistor_id: with ``add``, the id of the component that persists the model; by default ``persistor``.

    Raises:
        EditError: there is something that cannot be read or is not understood, or nothing to adopt.
    """
    result = Plan()
    for config in _configs(job):
        with config_text.refusing(config.path, "is not changed"):
            after, notes = _adopted(config, add=add, persistor_id=persistor_id or "persistor")
        if after != config.content:
            result.edits.append(Edit(config.path, config.content, after, keep=config.content))
        result.lines += [f"{config.path.name}: {note}" for note in [*notes, *_notes_on_code(config.path, job)]]
    return result


def plan_undo(job: Path) -> Plan:
    """Find out what undoing the adoption of a job would change: the kept original where nobody has edited the file
    since, otherwise the class paths alone.

    Raises:
        EditError: there is something that cannot be read or is not understood.
    """
    result = Plan()
    for config in _configs(job):
        after, why = editing.original(config.path, config.content)
        if after is None:
            with config_text.refusing(config.path, "is not changed back"):
                text = config_text.replace_paths(config.text, TO_FLIPS)
                after = _verified(config, text, _renamed(config.data, TO_FLIPS))
            if after != config.content:
                result.lines.append(f"{config.path.name}: {why}: class paths are changed back, everything else stays")
        if after != config.content or editing.originals(config.path):
            result.edits.append(Edit(config.path, config.content, after))
    return result


# -- finding ---------------------------------------------------------------------------------------------------------


def _configs(job: Path) -> list[Config]:
    if not job.is_dir():
        raise EditError(f"{job} is {'no folder: unpack the job first' if job.exists() else 'not there'}")
    found: dict[Path, Config] = {}
    for folder in filter(Path.is_dir, (job / "config", *sorted(job.glob("*/config")))):
        inside = editing.real_path(folder, job)  # before it is searched: a link could lead to a whole disk
        form, name = ConfigFactory.search_config_format(SERVER_CONFIG, [str(inside)])
        if form is not None and name is not None:
            path = editing.real_path(Path(name), job)
            found[path] = found.get(path) or config_text.load(path, form)
    if not found:
        raise EditError(
            f"{job} is no NVFLARE job: there is no <app>/config/config_fed_server.json, .conf or .yml in it"
        )
    return list(found.values())


# -- changing --------------------------------------------------------------------------------------------------------


def _adopted(config: Config, *, add: bool, persistor_id: str) -> tuple[bytes, list[str]]:
    notes: list[str] = []
    config.listed("components")  # refuses what is none
    text, data = config_text.replace_paths(config.text, TO_OURS), _renamed(config.data, TO_OURS)
    _refuse_unknown(data)
    if not any(path in CLASS_OF for _, path in _components(data)):
        if not add:
            raise ConfigTextError(
                f"it has no components of FLIP's: nothing to adopt. --add puts {HANDLER}, {PERSIST} and {GENERATOR} of "
                "this package into it"
            )
        text, data, notes = _with_ours(config, persistor_id)
    text, data, more = _handler_last(text, data)
    return _verified(config, text, data), [*notes, *more, *_notes_on(data)]


def _verified(config: Config, text: str, wanted: dict[str, Any]) -> bytes:
    """The text as bytes, once it is known to mean what is wanted, and nothing else."""
    if (text, wanted) == (config.text, config.data):
        return config.content
    try:
        right = config_text.same(config_text.parse(text, config.form), wanted)
    except ConfigTextError:
        right = False
    if not right:
        raise ConfigTextError(
            "its class paths cannot be changed without touching something else (are they composed or referred to?)"
        )
    return text.encode()


def _handler_last(text: str, data: dict[str, Any]) -> tuple[str, dict[str, Any], list[str]]:
    """Put the handler behind all other components, so that it hears of an event after they have handled it."""
    listed = data.get("components", [])
    places = [index for index, item in enumerate(listed) if _class_of(item) == HANDLER]
    if len(places) != sum(CLASS_OF.get(path) == HANDLER for _, path in _components(data)):
        raise ConfigTextError(f"it has a {HANDLER} that is not in its list of components")
    if len(places) > 1:
        raise ConfigTextError(f"it has {len(places)} components {HANDLER}, and one run has one")
    if not places:
        return text, data, [f"there is no {HANDLER}: nobody reports this app's statuses"]
    (place,) = places
    if place == len(listed) - 1:
        return text, data, []
    try:
        text = config_text.move_last(text, "components", place)
    except ConfigTextError:  # HOCON and YAML that are not written as JSON; no tool of FLIP's writes them at all
        return text, data, [f"{HANDLER} is not the last component: move it there by hand, to have it hear things last"]
    return text, {**data, "components": [*listed[:place], *listed[place + 1 :], listed[place]]}, []


def _with_ours(config: Config, persistor_id: str) -> tuple[str, dict[str, Any], list[str]]:
    """Add our components to an app that has none of FLIP's."""
    if config.form is not ConfigFormat.JSON:
        raise ConfigTextError("components are added to JSON only: write them into this file by hand")
    listed = config.listed("components")
    ids: dict[str, Any] = {str(item["id"]): item for item in listed if isinstance(item, dict) and "id" in item}
    if persistor_id not in ids:
        raise ConfigTextError(
            f"it has no component '{persistor_id}' that would know where the model is; --persistor names another one "
            f"(components: {', '.join(sorted(ids)) or 'none'})"
        )
    new: list[dict[str, Any]] = [
        {"id": "json_generator", "path": f"{OURS}.{GENERATOR}", "args": {}},
        {"id": "persist_and_cleanup", "path": f"{OURS}.{PERSIST}", "args": {"persistor_id": persistor_id}},
        {"id": "flip_server_event_handler", "path": f"{OURS}.{HANDLER}", "args": {}},
    ]
    if str(ids.get("json_generator", {}).get("path", "")).endswith("JsonGenerator"):
        new = new[1:]  # NVFLARE's own writes the same file
    taken = [item["id"] for item in new if item["id"] in ids]
    if taken:
        raise ConfigTextError(f"it has components with the ids that ours need: {', '.join(taken)}")
    data = {**config.data, "components": [*listed, *new]}
    added = ", ".join(item["id"] for item in new)
    return config_text.spelled_like(config.text, data), data, [f"added: {added}"]


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


def _components(value: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Everything with a class path, wherever it is, and that path."""
    if isinstance(value, dict):
        yield from ((value, value[key]) for key in PATH_KEYS if isinstance(value.get(key), str))
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _components(child)


def _class_of(component: Any) -> str | None:
    return next((CLASS_OF.get(path) for node, path in _components(component) if node is component), None)


def _refuse_unknown(data: dict[str, Any]) -> None:
    """Refuse classes and arguments of which nobody can say here what the run would do with them."""
    composed = any("{" in path or "$" in path for _, path in _components(data))
    if composed and _OF_FLIPS.search(repr(data)):
        raise ConfigTextError("it composes class paths of variables: write FLIP's class paths out in full")
    for node, path in _components(data):
        name, where = path.rsplit(".", 1)[-1], f"component '{node.get('id', '')}'"
        if _OF_FLIPS.match(path) and name not in STAYS_FLIPS:
            raise ConfigTextError(f"{where} is of FLIP's class {name}, not known here: it may do what ours does")
        if path not in CLASS_OF:
            continue
        args = node.get("args") or {}
        if not isinstance(args, dict):
            raise ConfigTextError(f"{where} has arguments that are no object")
        known = inspect.signature(getattr(components, CLASS_OF[path])).parameters
        unknown = sorted(args.keys() - known.keys())
        if unknown:
            raise ConfigTextError(
                f"{where} has arguments that our {CLASS_OF[path]} does not know: {', '.join(unknown)}"
            )


def _notes_on(data: dict[str, Any]) -> Iterator[str]:
    left = sorted({path for _, path in _components(data) if _OF_FLIPS.match(path)})
    if left:
        yield f"stay FLIP's, and need FLIP's package as before: {', '.join(left)}"
    listed = [item for item in data.get("components", []) if isinstance(item, dict)]
    handler: dict[str, Any] = next((item for item in listed if _class_of(item) == HANDLER), {})
    for argument in ("validation_json_generator_id", "persist_and_cleanup_id"):
        default = inspect.signature(components.ServerEventHandler).parameters[argument].default
        wanted = (handler.get("args") or {}).get(argument, default)
        if wanted not in [item.get("id") for item in listed]:
            yield f"there is no component '{wanted}', which {HANDLER} will ask for: the run would fail"


def _notes_on_code(config: Path, job: Path) -> Iterator[str]:
    """Which files of the app's own code, FLIP's copy of itself left out, use components of FLIP's that ours replace."""
    app = next((folder.parent for folder in config.parents if folder.name == "config"), job)
    custom = app / "custom"
    found = () if custom.is_symlink() else custom.rglob("*.py")
    sources = list(itertools.islice(found, _MAX_SOURCES))
    if not sources:
        yield "no custom code: the server accepts our classes only after flip-obs install of its kit"
    for file in sorted(sources):
        inside = file.relative_to(custom)
        names = sorted(set(CLASS_OF.values()) & _imported(file)) if inside.parts[0] != "flip" else []
        if names:
            yield f"custom/{inside} uses FLIP's {', '.join(names)}: import from {OURS} to have ours"


def _imported(file: Path) -> set[str]:
    try:
        source = editing.read(file) or b""
    except EditError:
        return set()  # a link, a pipe, a very large file: not for us to judge
    return {name.decode() for found in _IMPORT.findall(source) for name in re.findall(rb"\w+", found)}


__all__ = ["EditError", "Plan", "plan", "plan_undo"]
