"""Which model a run belongs to: found where FLIP's jobs say it, in what a researcher's job may have written anyhow."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext

from flip_observability.errors import report
from flip_observability.nvflare import context
from flip_observability.utils import canonical_uuid

APP_CONFIG = "app_server/custom/config.json"
JOB_META = "meta.json"
MAX_BYTES = 4 * 1024 * 1024
"""A larger file is not read: these hold a few settings, and the run's memory is not ours to fill."""


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
    try:
        return canonical_uuid(configured) or next(filter(None, map(canonical_uuid, _candidates(fl_ctx))), None)
    except Exception as error:  # noqa: BLE001 - promise: nothing of ours raises into the run
        report("model_id", error, "cannot look for the model id")
        return None


def model_id_of_run(run_dir: str | os.PathLike[str], job_meta: Mapping[str, Any] | None = None) -> str | None:
    """Find the model id from a run's folder alone, for processes that have no context of the run.

    Args:
        run_dir: the folder that holds ``meta.json`` and ``app_server``; an empty text when there is none.
        job_meta: the job's metadata where the caller has them, asked after the folder's own.
    """
    return next(filter(None, map(canonical_uuid, _named_in(run_dir, job_meta))), None)


def _candidates(fl_ctx: FLContext) -> Iterator[Any]:
    yield from _named_in(context.run_directory(fl_ctx), fl_ctx.get_prop(FLContextKey.JOB_META, None))


def _named_in(run_dir: str | os.PathLike[str], job_meta: Any) -> Iterator[Any]:
    root = Path(run_dir).resolve() if str(run_dir) else None
    yield _read_object(root, APP_CONFIG).get("FLIP_MODEL_ID")
    metas = [_read_object(root, JOB_META), job_meta if isinstance(job_meta, Mapping) else {}]
    for meta in metas:
        props = meta.get("custom_props")
        yield props.get("model_id") if isinstance(props, Mapping) else None
    for meta in metas:
        yield meta.get("name")


def _read_object(root: Path | None, name: str) -> Mapping[str, Any]:
    """Read a JSON object below the run's folder; an empty one when it is missing, no such thing, or a link."""
    path = root / name if root is not None else None
    # A link could lead to another job's file, and to a device that never ends.
    if path is None or not path.exists() or path.resolve() != path:
        return {}
    try:
        content = json.loads(_read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        report("model_id", error, f"cannot read {name} of the run; it names no model id")
        return {}
    return content if isinstance(content, dict) else {}


def _read_bytes(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)  # non-blocking: a FIFO
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError("not a regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError("too large")
    return content
