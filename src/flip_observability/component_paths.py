"""The class paths under which jobs name our components, and those of FLIP's components that ours stand in for.

Nothing here imports a component, or NVFLARE: ``flip-obs doctor`` needs the paths where neither can be loaded.
"""

from __future__ import annotations

from collections.abc import Iterable

PACKAGE = "flip_observability"
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

CLASS_OF = {
    path: name for name, (_, module) in _MODULES.items() for path in (f"{OURS}.{name}", f"{OURS}.{module}.{name}")
}
"""Every path of a component of ours, and its name. These are what an allow list needs, and nothing shorter: NVFLARE
takes an entry for all that begins with it, and a job without custom code may then run whatever our modules import."""

TO_FLIPS = {path: f"{FLIPS}.{name}" for path, name in CLASS_OF.items()}
TO_OURS = {
    path: f"{OURS}.{name}"
    for name, (module, _) in _MODULES.items()
    for package in (FLIPS, "flip.components")
    for path in (f"{package}.{name}", f"{package}.{module}.{name}")
}


def is_of_our_package(entry: object) -> bool:
    """Whether an entry of an allow list is about our package, exact or not."""
    return isinstance(entry, str) and (entry == PACKAGE or entry.startswith(f"{PACKAGE}."))


def too_wide(entries: Iterable[object]) -> list[str]:
    """The entries of an allow list that let in more of our package than its components."""
    return [entry for entry in entries if isinstance(entry, str) and is_of_our_package(entry) and entry not in CLASS_OF]
