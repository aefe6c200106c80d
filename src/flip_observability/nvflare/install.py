"""Putting this package into a provisioned server kit, and taking it out again.

Two files of the kit's ``local/`` folder, which NVFLARE leaves to the site: a resource file of our own that adds the
observer to the server's parent process, and the entry of the class allow list that lets jobs without custom code name
our components.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST
from nvflare.fuel.utils.config import ConfigFormat

from flip_observability import editing
from flip_observability.editing import Edit, EditError
from flip_observability.nvflare import config_text
from flip_observability.nvflare.config_text import ConfigTextError

ALLOW_LIST, ALLOWED = "class_allow_list", "flip_observability."
COMPONENT: Mapping[str, Any] = {
    "id": "flip_server_observer",
    "path": "flip_observability.nvflare.server_observer.ServerObserver",
    "args": {},
}
OBSERVER_FILE = "flip_observability__p_resources.json"
"""NVFLARE reads ``*__p_resources.json`` into the parent process alone."""
RESOURCES, DEFAULT_RESOURCES = "resources.json", "resources.json.default"
_STARTUP = "startup/fed_server.json"
_RESOURCE_PATTERNS = ("*__resources.json", "*__p_resources.json", RESOURCES, DEFAULT_RESOURCES)


class InstallError(Exception):
    """The kit is not changed. The text is one line for the user, with the reason."""


@dataclass
class KitPlan:
    """What would be done to a kit: edits, and lines that say it."""

    edits: list[Edit] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def difference(self) -> Iterator[str]:
        """The edits as lines of a unified difference."""
        for edit in self.edits:
            before, after = ((content or b"").decode().splitlines() for content in (edit.before, edit.after))
            old = str(edit.path) if edit.before is not None else "/dev/null"
            new = str(edit.path) if edit.after is not None else "/dev/null"
            yield from difflib.unified_diff(before, after, old, new, lineterm="")


def plan(kit: Path) -> KitPlan:
    """Find out what installing into a kit would change.

    Raises:
        InstallError: it is no server kit, or there is something in it that is not understood.
        EditError: a file cannot be read, or is a link out of the kit.
    """
    local = _local_folder(kit)
    result = KitPlan()
    try:
        _allow(kit, local, result)
        _observe(kit, local, result)
    except ConfigTextError as error:
        raise InstallError(f"{local} is not changed: {error}") from None
    if (local / "signature.json").exists() and result.edits:
        result.warnings.append(
            "this kit's local folder is signed, and a check of its signatures fails from now on; a server that starts "
            "checks those of startup only"
        )
    return result


def plan_undo(kit: Path) -> KitPlan:
    """Find out what taking this package out of a kit would change.

    Raises:
        InstallError: it is no server kit, or there is something in it that is not understood.
        EditError: a file cannot be read, or is a link out of the kit.
    """
    local = _local_folder(kit)
    result = KitPlan()
    try:
        _disallow(kit, local, result)
        _stop_observing(kit, local, result)
    except ConfigTextError as error:
        raise InstallError(f"{local} is not changed: {error}") from None
    return result


def apply(wanted: KitPlan) -> None:
    """Do what was planned, all of it or nothing.

    Raises:
        EditError: nothing was changed, with the reason.
    """
    editing.apply(wanted.edits)


# -- what is a kit ---------------------------------------------------------------------------------------------------


def _local_folder(kit: Path) -> Path:
    if not kit.is_dir():
        raise InstallError(f"{kit} {'is no folder' if kit.exists() else 'does not exist'}")
    reason = _why_no_server_kit(kit) or _why_not_to_be_changed(kit)
    if reason:
        raise InstallError(f"{kit} {reason}")
    return kit / "local"


def _why_no_server_kit(kit: Path) -> str | None:
    startup = kit / "startup"
    if (startup / "fed_server.json").is_file():
        return None if (kit / "local").is_dir() else "is no complete server kit: there is no local folder in it"
    for name, owner in (("fed_client.json", "a client"), ("fed_admin.json", "an admin")):
        if (startup / name).is_file():
            return f"is the kit of {owner}, and this belongs into the server's"
    below = sorted(file.parent.parent for depth in ("*", "*/*", "*/*/*") for file in kit.glob(f"{depth}/{_STARTUP}"))
    hint = f"; did you mean {below[0]}?" if below else ""
    return f"is no server kit: there is no {_STARTUP} in it{hint}"


def _why_not_to_be_changed(kit: Path) -> str | None:
    local = kit / "local"
    if local.is_symlink() and local.resolve().parent.name == "kit":
        return "is a working copy that start.sh makes anew at every start: name the kit that it is made from"
    if (kit / "signature.json").exists():
        return (
            "is a kit for a confidential VM, signed as a whole: name our classes in the provisioning project "
            "(class_allow_list) instead"
        )
    return None


# -- the allow list --------------------------------------------------------------------------------------------------


def _resources(kit: Path, local: Path) -> tuple[Path, Path]:
    """The file that NVFLARE takes the allow list from, and the one that a site's own list belongs into."""
    for name in (RESOURCES, DEFAULT_RESOURCES):
        if (local / name).exists():
            return editing.real_path(local / name, kit), editing.real_path(local / RESOURCES, kit)
    raise InstallError(f"{local} has neither {RESOURCES} nor {DEFAULT_RESOURCES}: no server starts from it")


def _read(path: Path) -> tuple[bytes, str, dict[str, Any]]:
    content = editing.read(path) or b""
    try:
        text = config_text.decode(content)
        return content, text, config_text.parse(text, ConfigFormat.JSON)
    except ConfigTextError as error:
        raise InstallError(f"{path} is not understood: {error}") from None


def _allow(kit: Path, local: Path, result: KitPlan) -> None:
    source, target = _resources(kit, local)
    content, text, data = _read(source)
    allowed = data.get(ALLOW_LIST)
    if allowed is not None and not isinstance(allowed, list):
        raise InstallError(f"{source}: {ALLOW_LIST} is no list")
    if allowed is not None and (ALLOWED in allowed or "*" in allowed):
        return
    after = _with_entry(text, data).encode()
    if source == target:
        stale = tuple(file for file in editing.originals(target) if file != editing.backup_name(target, after))
        result.edits.append(Edit(target, content, after, keep=True, discard=stale))
    else:
        result.edits.append(Edit(target, None, after, like=source))
    made = "" if source == target else f" (made from {source.name})"
    result.lines.append(f'{target}{made}: "{ALLOWED}" in {ALLOW_LIST}')


def _with_entry(text: str, data: dict[str, Any]) -> str:
    allowed = data.get(ALLOW_LIST)
    if allowed is None:
        # Without a list NVFLARE takes its own; a list with nothing but our entry would lock out everything else.
        everything = [*DEFAULT_CLASS_ALLOW_LIST, ALLOWED]
        after = config_text.prepend_member(text, ALLOW_LIST, everything)
        wanted = {ALLOW_LIST: everything, **{key: data[key] for key in data if key != ALLOW_LIST}}
    else:
        found = config_text.array(text, ConfigFormat.JSON, ALLOW_LIST)
        if found is None:
            raise ConfigTextError(f"its {ALLOW_LIST} is not understood")
        after = config_text.append(text, found, [ALLOWED])
        wanted = {**data, ALLOW_LIST: [*allowed, ALLOWED]}
    return _verified(after, wanted)


def _disallow(kit: Path, local: Path, result: KitPlan) -> None:
    source, target = _resources(kit, local)
    if source != target:
        return  # there is no list of the site's own
    content, text, data = _read(target)
    default = editing.real_path(local / DEFAULT_RESOURCES, kit)
    kept = editing.original(target, content)
    if kept is not None and kept.untouched:
        others = tuple(file for file in editing.originals(target) if file != kept.path)
        edit = Edit(target, content, editing.read(kept.path), restore=kept.path, discard=others)
    elif kept is None and _made_from(default, content):
        edit = Edit(target, content, None)
    else:
        after = _without_entry(text, data)
        edit = Edit(target, content, after.encode(), discard=editing.originals(target))
        if after != text:
            why = "it was edited since" if kept else "there is no original beside it"
            result.warnings.append(f'{target}: {why}, so "{ALLOWED}" is taken out and everything else stays')
    if edit.before != edit.after or edit.restore or edit.discard:
        result.edits.append(edit)
        result.lines.append(f"{target}: {'removed' if edit.after is None else 'as it was'}")


def _made_from(default: Path, content: bytes) -> bool:
    if not default.exists():
        return False
    _, text, data = _read(default)
    allowed = data.get(ALLOW_LIST)
    if allowed is not None and (not isinstance(allowed, list) or ALLOWED in allowed):
        return False
    return _with_entry(text, data).encode() == content


def _without_entry(text: str, data: dict[str, Any]) -> str:
    allowed = data.get(ALLOW_LIST)
    if not isinstance(allowed, list) or ALLOWED not in allowed:
        return text
    found = config_text.array(text, ConfigFormat.JSON, ALLOW_LIST)
    if found is None or len(found.items) != len(allowed):
        raise ConfigTextError(f"its {ALLOW_LIST} is not understood")
    place = allowed.index(ALLOWED)
    wanted = {**data, ALLOW_LIST: allowed[:place] + allowed[place + 1 :]}
    return _verified(config_text.remove_item(text, found, place), wanted)


def _verified(text: str, wanted: dict[str, Any]) -> str:
    if not config_text.same(config_text.parse(text, ConfigFormat.JSON), wanted):
        raise ConfigTextError("it is written in a way that cannot be changed without touching something else")
    return text


# -- the observer ----------------------------------------------------------------------------------------------------


def _observer_content() -> bytes:
    return (json.dumps({"format_version": 2, "components": [dict(COMPONENT)]}, indent=2) + "\n").encode()


def _components_of(path: Path) -> list[Any]:
    listed = _read(path)[2].get("components", [])
    if not isinstance(listed, list):
        raise InstallError(f"{path}: its components are no list")
    return listed


def _observe(kit: Path, local: Path, result: KitPlan) -> None:
    path = editing.real_path(local / OBSERVER_FILE, kit)
    for file in _other_resources(kit, path):
        for item in _components_of(file):
            if isinstance(item, dict) and (item.get("id"), item.get("path")) != (None, None):
                if item.get("path") == COMPONENT["path"]:
                    result.warnings.append(f"{file} has the observer already; {OBSERVER_FILE} is not needed")
                    return
                if item.get("id") == COMPONENT["id"]:
                    raise InstallError(f"{file} has another component with the id {COMPONENT['id']}")
    content = editing.read(path)
    if content is None:
        source, _ = _resources(kit, local)
        result.edits.append(Edit(path, None, _observer_content(), like=source))
        result.lines.append(f"{path}: {COMPONENT['path']} in the server's parent process")
    elif COMPONENT["path"] not in [item.get("path") for item in _components_of(path) if isinstance(item, dict)]:
        raise InstallError(f"{path} is there, and is not ours: it has no {COMPONENT['path']}")


def _other_resources(kit: Path, ours: Path) -> Iterator[Path]:
    seen = {ours}
    for folder in (kit / "startup", kit / "local"):
        for pattern in _RESOURCE_PATTERNS:
            for file in sorted(folder.glob(pattern)):
                hidden = file.name == DEFAULT_RESOURCES and (folder / RESOURCES).exists()
                if file.resolve() not in seen and not hidden:
                    seen.add(file.resolve())
                    yield file


def _stop_observing(kit: Path, local: Path, result: KitPlan) -> None:
    path = editing.real_path(local / OBSERVER_FILE, kit)
    content = editing.read(path)
    if content is None:
        return
    listed = _components_of(path)
    if any(not isinstance(item, dict) or item.get("path") != COMPONENT["path"] for item in listed):
        raise InstallError(f"{path} holds more than the observer: move that elsewhere first")
    arguments = [item.get("args") for item in listed if item.get("args")]
    if arguments:
        result.warnings.append(f"{path} is removed with the arguments that somebody gave the observer")
    result.edits.append(Edit(path, content, None))
    result.lines.append(f"{path}: removed")


__all__ = ["EditError", "InstallError", "KitPlan", "apply", "plan", "plan_undo"]
