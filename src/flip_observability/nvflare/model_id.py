"""Which model a run belongs to: found where FLIP's jobs say it, in what a researcher's job may have written anyhow."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.utils.config import ConfigFormat

from flip_observability.errors import report
from flip_observability.nvflare import context
from flip_observability.utils import canonical_uuid

APP_CONFIG = "app_server/custom/config.json"
JOB_META = "meta.json"
SERVER_CONFIG = "app_server/config/config_fed_server"
HANDLER = ".ServerEventHandler"
ARGUMENT, CONFIG = "the component's argument", "FLIP_MODEL_ID in custom/config.json"
PROPS, NAME = "custom_props in meta.json", "the job's name"
PROBLEM = "model_id"
"""The problem that a run has whose sources contradict each other."""
MAX_BYTES = 1024 * 1024
"""A larger file is not read: these hold a few settings, and the memory of server and run is not ours to fill."""
_VARIABLE = re.compile(r"\{(\w+)\}")


Named = Iterable[tuple[str, Any]]
"""What each source names, in the order in which they count."""


@dataclass(frozen=True)
class FoundModel:
    """What the sources of a model id say, weighed.

    Args:
        model_id: in canonical spelling, of the first source that names one; None when none does.
        source: which that was.
        lost: other models, and the first source that names each: they are told nothing of this run.
    """

    model_id: str | None = None
    source: str = ""
    lost: Mapping[str, str] = field(default_factory=dict)

    def tell(self, job_id: str) -> None:
        """Count and log a contradiction, if there is one."""
        if self.lost:
            others = ", ".join(f"{source} names {model_id}" for model_id, source in self.lost.items())
            what = f"job {job_id} belongs to model {self.model_id} by {self.source}, and {others}: not told anything"
            report("model_id", "Contradiction", what)


def find_model(fl_ctx: FLContext, configured: str | None = "") -> FoundModel:
    """Weigh what a run's sources name as its model, as :func:`resolve_model_id` asks them. Nothing is raised."""
    return _weigh(_all_named(configured, fl_ctx))


def resolve_model_id(fl_ctx: FLContext, configured: str | None = "") -> str | None:
    """Find the model id of a run.

    Asked in this order: the component's own argument, ``FLIP_MODEL_ID`` in the app's ``custom/config.json``,
    ``custom_props.model_id`` in the job's ``meta.json``, and the job's name; the first that is a UUID counts.

    Args:
        fl_ctx: any context of the run; one without engine, workspace or job id only has less to tell.
        configured: what the job's configuration gave the component, possibly nothing.

    Returns:
        The id in its canonical spelling, or None when nobody names one. Nothing is raised.
    """
    return canonical_uuid(configured) or find_model(fl_ctx).model_id


def model_id_of_run(run_dir: str | os.PathLike[str], job_meta: Mapping[str, Any] | None = None) -> str | None:
    """Find the model id from a run's folder alone, for processes that have no context of the run.

    Args:
        run_dir: the folder that holds ``meta.json`` and ``app_server``; an empty text when there is none.
        job_meta: the job's metadata where the caller has them, asked after the folder's own.
    """
    return _weigh(_named_in(run_dir, job_meta)).model_id


def find_model_of_queued_job(job_meta: Mapping[str, Any]) -> FoundModel:
    """Weigh what the metadata of a job name that has no folder yet.

    Its name counts first: FLIP names a job after its model and writes the same id into the ``custom/config.json`` that
    will count when the job has begun, while the metadata's ``custom_props`` are the researcher's own.
    """
    named = list(_named_in("", job_meta))
    return _weigh(sorted(named, key=lambda item: item[0] != NAME))


def find_model_of_job(run_dir: str | os.PathLike[str]) -> FoundModel:
    """Weigh what a job that has begun names as its model, for the server's parent process: as the job's own will.

    Of what a job brings only plain JSON is parsed in that process, which must outlive every job. No model also means
    that only the job's process can tell: its configuration has another form, or names the model by what is not in it.
    """
    found = server_config(run_dir)
    argument = "" if found is None else _argument_in(*found)
    return FoundModel() if argument is None else _weigh([(ARGUMENT, argument), *_named_in(run_dir, None)])


def model_id_of_job(run_dir: str | os.PathLike[str]) -> str | None:
    """Find the model id of a job that has begun (see :func:`find_model_of_job`)."""
    return find_model_of_job(run_dir).model_id


def server_config(run_dir: str | os.PathLike[str]) -> tuple[str, bytes | None] | None:
    """Read the server's configuration in a run's folder that NVFLARE takes.

    Returns:
        Its file's extension and its bytes, None for what is not to be read (too large, a link, a pipe); or None when
        the folder has no configuration.
    """
    root = Path(run_dir).resolve()
    for extension in ConfigFormat.config_ext_formats():
        name = SERVER_CONFIG + extension
        if os.path.lexists(root / name):
            try:
                return extension, _read_bytes(_inside(root, name))
            except (OSError, ValueError) as error:
                report("model_id", error, "cannot read the server's configuration of a job")
                return extension, None
    return None


def _argument_in(extension: str, content: bytes | None) -> str | None:
    """What the configuration gives the event handler as the model id; None when that cannot be told from here."""
    if content is None:
        return None
    if not extension.startswith(".json"):
        return None if b"model_id" in content else ""
    try:
        data = json.loads(content)
        listed = data.get("components") or []
        handler: Mapping[str, Any] = next((item for item in listed if str(item.get("path", "")).endswith(HANDLER)), {})
        argument = str((handler.get("args") or {}).get("model_id") or "")
    except (ValueError, RecursionError, AttributeError, TypeError) as error:
        report("model_id", error, "cannot read the server's configuration of a job")
        return None
    variable = _VARIABLE.fullmatch(argument)
    if variable and variable[1] in data:
        return str(data[variable[1]])
    return None if "{" in argument and canonical_uuid(argument) is None else argument


def _weigh(named: Named) -> FoundModel:
    known: list[tuple[str, str]] = []
    try:
        for source, value in named:
            model_id = canonical_uuid(value)
            if model_id is not None:
                known.append((source, model_id))
    except Exception as error:  # noqa: BLE001 - promise: nothing of ours raises into the run; what was named counts
        report("model_id", error, "cannot ask every source for the model id")
    if not known:
        return FoundModel()
    first, winner = known[0]
    lost = {model_id: source for source, model_id in reversed(known) if model_id != winner}
    return FoundModel(winner, first, lost)


def _all_named(configured: str | None, fl_ctx: FLContext) -> Iterator[tuple[str, Any]]:
    yield ARGUMENT, configured
    yield from _named_in(context.run_directory(fl_ctx), fl_ctx.get_prop(FLContextKey.JOB_META, None))


def _named_in(run_dir: str | os.PathLike[str], job_meta: Any) -> Iterator[tuple[str, Any]]:
    root = Path(run_dir).resolve() if str(run_dir) else None
    yield CONFIG, _read_object(root, APP_CONFIG).get("FLIP_MODEL_ID")
    metas = [_read_object(root, JOB_META), job_meta if isinstance(job_meta, Mapping) else {}]
    for meta in metas:
        props = meta.get("custom_props")
        yield PROPS, props.get("model_id") if isinstance(props, Mapping) else None
    for meta in metas:
        yield NAME, meta.get("name")


def _read_object(root: Path | None, name: str) -> Mapping[str, Any]:
    """Read a JSON object below the run's folder; an empty one when it is missing, no such thing, or a link."""
    if root is None or not (root / name).exists():
        return {}
    try:
        content = json.loads(_read_bytes(_inside(root, name)))
    except (OSError, ValueError, RecursionError) as error:
        report("model_id", error, f"cannot read {name} of the run; it names no model id")
        return {}
    return content if isinstance(content, dict) else {}


def _inside(root: Path, name: str) -> Path:
    # A link could lead to another job's file, and to a device that never ends.
    path = root / name
    if os.path.realpath(path) != str(path):
        raise OSError("a link on the way")
    return path


def _read_bytes(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking: a FIFO
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError("too large")
    return content
