"""Putting this package into a provisioned server kit, and taking it out again.

Two files of the kit's ``local/`` folder, which NVFLARE leaves to the site: a resource file of our own that adds the
observer to the server's parent process, and entries of the class allow list that let jobs without custom code name our
components, and nothing else of ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

from flip_observability import editing
from flip_observability.component_paths import CLASS_OF, is_of_our_package, too_wide
from flip_observability.editing import Edit, EditError, Plan
from flip_observability.nvflare import config_text
from flip_observability.nvflare.config_text import Config

ALLOW_LIST = "class_allow_list"
COMPONENT = {
    "id": "flip_server_observer",
    "path": "flip_observability.nvflare.server_observer.ServerObserver",
    "args": {},
}
OBSERVER_FILE = "flip_observability__p_resources.json"
"""NVFLARE reads ``*__p_resources.json`` into the parent process alone."""
_OBSERVER = (json.dumps({"format_version": 2, "components": [COMPONENT]}, indent=2) + "\n").encode()
RESOURCES, DEFAULT_RESOURCES = "resources.json", "resources.json.default"
_STARTUP = "startup/fed_server.json"
_RESOURCE_PATTERNS = ("*__resources.json", "*__p_resources.json", RESOURCES, DEFAULT_RESOURCES)


def plan(kit: Path) -> Plan:
    """Find out what installing into a kit would change.

    Raises:
        EditError: it is no server kit, or something in it cannot be read or is not understood.
    """
    local = _local_folder(kit)
    result = Plan()
    _allow(kit, local, result)
    _observe(kit, local, result)
    if (local / "signature.json").exists() and result.edits:
        result.warnings.append(
            "this kit's local folder is signed, and a check of its signatures fails from now on; a server that starts "
            "checks those of startup only"
        )
    return result


def plan_undo(kit: Path) -> Plan:
    """Find out what taking this package out of a kit would change.

    Raises:
        EditError: it is no server kit, or something in it cannot be read or is not understood.
    """
    local = _local_folder(kit)
    result = Plan()
    _disallow(kit, local, result)
    _stop_observing(kit, local, result)
    return result


# -- what is a kit ---------------------------------------------------------------------------------------------------


def _local_folder(kit: Path) -> Path:
    startup, local = kit / "startup", kit / "local"
    is_servers = (kit / _STARTUP).is_file()
    reasons = (
        (not kit.exists(), "does not exist"),
        (not kit.is_dir(), "is no folder"),
        (not is_servers and (startup / "fed_client.json").is_file(), "is the kit of a client, not of the server"),
        (not is_servers and (startup / "fed_admin.json").is_file(), "is the kit of an admin, not of the server"),
        (not is_servers, f"is no server kit: there is no {_STARTUP} in it"),
        (not local.is_dir(), "is no complete server kit: there is no local folder in it"),
        (
            local.is_symlink() and local.resolve().parent.name == "kit",
            "is a working copy that start.sh makes anew at every start: name the kit that it is made from",
        ),
        (
            (kit / "signature.json").exists(),
            f"is a kit for a confidential VM, signed as a whole: put our classes into its project's {ALLOW_LIST}",
        ),
    )
    for applies, reason in reasons:
        if applies:
            raise EditError(f"{kit} {reason}{'' if is_servers else _hint(kit)}")
    return local


def _hint(kit: Path) -> str:
    below = sorted(file.parent.parent for depth in ("*", "*/*", "*/*/*") for file in kit.glob(f"{depth}/{_STARTUP}"))
    return f"; did you mean {below[0]}?" if below else ""


# -- the allow list --------------------------------------------------------------------------------------------------


def _resources(kit: Path, local: Path) -> tuple[Path, Path]:
    """The file that NVFLARE takes the allow list from, and the one that a site's own list belongs into."""
    for name in (RESOURCES, DEFAULT_RESOURCES):
        if (local / name).exists():
            return editing.real_path(local / name, kit), editing.real_path(local / RESOURCES, kit)
    raise EditError(f"{local} has neither {RESOURCES} nor {DEFAULT_RESOURCES}: no server starts from it")


def _allowed(config: Config) -> list[Any]:
    """What NVFLARE allows: without a list its own, and a list with our entries alone would lock out everything else."""
    return config.listed(ALLOW_LIST) if ALLOW_LIST in config.data else [*DEFAULT_CLASS_ALLOW_LIST]


def _allow(kit: Path, local: Path, result: Plan) -> None:
    source, target = _resources(kit, local)
    config = config_text.load(source)
    listed = config.listed(ALLOW_LIST)
    wide = too_wide(listed)
    if "*" in listed or (not wide and all(path in listed for path in CLASS_OF)):
        return
    after = _with_list(config, [*_others(_allowed(config)), *CLASS_OF])
    if source != target:
        result.edits.append(Edit(target, None, after, like=source))
    else:
        result.edits.append(Edit(target, config.content, after, keep=_true_original(config, listed)))
    result.lines.append(f"{target}: the {len(CLASS_OF)} paths of our components in {ALLOW_LIST}")
    if wide:
        result.lines.append(f"{target}: {', '.join(map(json.dumps, wide))} let in any of our code, and is taken out")


def _with_list(config: Config, entries: list[Any]) -> bytes:
    return config_text.spelled_like(config.text, {**config.data, ALLOW_LIST: entries}).encode()


def _true_original(config: Config, listed: list[Any]) -> bytes | None:
    """What undoing brings back: never a list that an earlier version of this package has put itself into."""
    kept, _ = editing.original(config.path, config.content)
    return config.content if kept is None and not any(map(is_of_our_package, listed)) else kept


def _disallow(kit: Path, local: Path, result: Plan) -> None:
    source, target = _resources(kit, local)
    if source != target:
        return  # there is no list of the site's own
    config = config_text.load(target)
    after = _without_ours(config, editing.real_path(local / DEFAULT_RESOURCES, kit), result)
    if after != config.content or editing.originals(target):
        result.edits.append(Edit(target, config.content, after))
        result.lines.append(f"{target}: {'removed' if after is None else 'as it was'}")


def _without_ours(config: Config, default: Path, result: Plan) -> bytes | None:
    listed = config.listed(ALLOW_LIST)
    before, why = editing.original(config.path, config.content)
    if before is not None:
        return before
    if not any(map(is_of_our_package, listed)):
        return config.content
    if not editing.originals(config.path) and _made_from(default, config):
        return None
    result.warnings.append(f"{config.path}: {why}, so our entries are taken out and everything else stays")
    return _with_list(config, _others(listed))


def _made_from(default: Path, config: Config) -> bool:
    """Whether this package, or an earlier version of it, made a file of the kit's default and nobody edited it."""
    if not default.exists():
        return False
    one, other = ({**each.data, ALLOW_LIST: _others(_allowed(each))} for each in (config, config_text.load(default)))
    return one == other


def _others(listed: Iterable[Any]) -> list[Any]:
    return [entry for entry in listed if not is_of_our_package(entry)]


# -- the observer ----------------------------------------------------------------------------------------------------


def _components_of(path: Path) -> list[dict[str, Any]]:
    listed = config_text.load(path).listed("components")
    return [item if isinstance(item, dict) else {} for item in listed]


def _observe(kit: Path, local: Path, result: Plan) -> None:
    path = editing.real_path(local / OBSERVER_FILE, kit)
    for file in _other_resources(kit, path):
        for item in _components_of(file):
            if item.get("path") == COMPONENT["path"]:
                result.warnings.append(f"{file} has the observer already; {OBSERVER_FILE} is not needed")
                return
            if item.get("id") == COMPONENT["id"]:
                raise EditError(f"{file} has another component with the id {COMPONENT['id']}")
    content = editing.read(path)
    if content is None:
        source, _ = _resources(kit, local)
        result.edits.append(Edit(path, None, _OBSERVER, like=source))
        result.lines.append(f"{path}: {COMPONENT['path']} in the server's parent process")
    elif COMPONENT["path"] not in [item.get("path") for item in _components_of(path)]:
        raise EditError(f"{path} is there, and is not ours: it has no {COMPONENT['path']}")


def _other_resources(kit: Path, ours: Path) -> Iterator[Path]:
    seen = {ours}
    for folder in (kit / "startup", kit / "local"):
        for file in sorted(file for pattern in _RESOURCE_PATTERNS for file in folder.glob(pattern)):
            hidden = file.name == DEFAULT_RESOURCES and (folder / RESOURCES).exists()
            real = file.resolve()
            if real not in seen and not hidden:
                seen.add(real)
                yield real


def _stop_observing(kit: Path, local: Path, result: Plan) -> None:
    path = editing.real_path(local / OBSERVER_FILE, kit)
    content = editing.read(path)
    if content is None:
        return
    listed = _components_of(path)
    if any(item.get("path") != COMPONENT["path"] for item in listed):
        raise EditError(f"{path} holds more than the observer: move that elsewhere first")
    if any(item.get("args") for item in listed):
        result.warnings.append(f"{path} is removed with the arguments that somebody gave the observer")
    result.edits.append(Edit(path, content, None))
    result.lines.append(f"{path}: removed")


__all__ = ["EditError", "Plan", "plan", "plan_undo"]
