"""What an NVFLARE context tells about an event. Contexts can lack everything: nothing here raises for that."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DataKind, from_shareable
from nvflare.apis.fl_constant import FedEventHeader, FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from flip_observability.constants import FlareEvents, FlipEvents, FlipProps
from flip_observability.errors import report
from flip_observability.lifecycle import Scalar

FLIP_CONTROLLERS = "flip.nvflare.controllers"
"""FLIP's own controllers send results and metrics to the hub themselves; what they do is not sent twice."""

_SENT_BY_FLIPS_CONTROLLERS = frozenset({FlareEvents.AFTER_CONTRIBUTION_ACCEPT.value, FlipEvents.SEND_RESULT.value})
"""What they send; the beginning and the end of a round are left to the handler."""

RESULT_PROPS = {name: f"flip.results.{name}" for name in ("uri", "bytes", "files", "crc32")}
"""What is known of an upload, and under which name the context of RESULTS_UPLOAD_COMPLETED holds it."""
MAX_TEXT = 256
"""Characters kept of a name that comes from outside."""


def event_attributes(event_type: str, fl_ctx: FLContext, *, relay: bool) -> dict[str, Scalar]:
    """What the context tells about an event that the lifecycle knows.

    Args:
        event_type: the event.
        fl_ctx: its context.
        relay: whether the hub takes round events and nobody else sends them.
    """
    attrs: dict[str, Scalar] = {}
    workflow = _prop(fl_ctx, FLContextKey.WORKFLOW)
    if isinstance(workflow, str):
        attrs["workflow"] = workflow[:MAX_TEXT]
    if relay:
        attrs["relay"] = True
    read = _READERS.get(event_type)
    if read is not None:
        try:
            attrs |= read(fl_ctx, relay)
        except Exception as error:  # noqa: BLE001 - the event counts, even when its details cannot be read
            report("context", error, f"cannot read the details of {event_type}; it is recorded without them")
    return attrs


def metric_of(fl_ctx: FLContext) -> dict[str, Any] | None:
    """The metric that a client sent with ``FlipEvents.SEND_RESULT``; None when it is none."""
    data = _prop(fl_ctx, FLContextKey.EVENT_DATA)
    if not isinstance(data, Shareable):
        return None
    dxo = from_shareable(data)
    if dxo.data_kind != DataKind.METRICS or not {"label", "value"} <= dxo.data.keys():
        return None
    client = data.get_peer_prop(ReservedKey.IDENTITY_NAME, "") or peer_name(fl_ctx)
    client = client or data.get_header(FedEventHeader.ORIGIN, "")
    x_label = dxo.data.get("x_label")
    value = float(dxo.data["value"])
    if not math.isfinite(value):
        return None
    return {
        "client": str(client)[:MAX_TEXT],
        "label": str(dxo.data["label"])[:MAX_TEXT],
        "value": value,
        "round": _finite(dxo.data.get("round")),
        "x_value": _finite(dxo.data.get("x_value")),
        "x_label": x_label[:MAX_TEXT] if isinstance(x_label, str) else None,
    }


def _finite(value: Any) -> int | float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if usable else None


def peer_name(fl_ctx: FLContext) -> str:
    """The client of an event on a client's thread."""
    peer = fl_ctx.get_peer_context()
    name = peer.get_identity_name() if peer is not None else ""
    return name[:MAX_TEXT] if isinstance(name, str) else ""


def job_id_of(fl_ctx: FLContext) -> str:
    """NVFLARE's job id, or nothing."""
    job_id = fl_ctx.get_job_id()
    return job_id[:MAX_TEXT] if isinstance(job_id, str) else ""


def workspace_root(fl_ctx: FLContext) -> Path | None:
    """The server's workspace, where the ledger's folder is by default."""
    root = _from_workspace(fl_ctx, lambda workspace: workspace.get_root_dir())
    return Path(root) if isinstance(root, str) else None


def run_directory(fl_ctx: FLContext) -> str:
    """The folder of this run's files, or nothing."""
    job_id = job_id_of(fl_ctx)
    path = _from_workspace(fl_ctx, lambda workspace: workspace.get_run_dir(job_id)) if job_id else ""
    return path if isinstance(path, str) else ""


def is_ours_to_relay(event_type: str, fl_ctx: FLContext) -> bool:
    """Whether nobody else tells the hub of such an event in this job."""
    return event_type not in _SENT_BY_FLIPS_CONTROLLERS or not has_flips_workflow(fl_ctx)


def has_flips_workflow(fl_ctx: FLContext) -> bool:
    """Whether one of the job's workflows is a controller of FLIP's, or made of one.

    All of them, not only the one that runs: FLIP's controller goes on sending metrics after its last round.
    """
    try:
        runner = _prop(fl_ctx, FLContextKey.RUNNER)
        workflows = getattr(getattr(runner, "config", None), "workflows", None) or []
        return any(_is_flips(type(workflow.controller)) for workflow in workflows)
    except Exception as error:  # noqa: BLE001 - internals of NVFLARE: an unknown shape means "not FLIP's"
        report("context", error, "cannot tell whose controllers the job has; its events are relayed")
        return False


def is_aborted(fl_ctx: FLContext) -> bool:
    """Whether the run was aborted by now, by a person or because a client's process died."""
    return getattr(fl_ctx.get_run_abort_signal(), "triggered", None) is True


def _is_flips(controller: type) -> bool:
    return any(f"{kind.__module__}.".startswith(f"{FLIP_CONTROLLERS}.") for kind in controller.__mro__)


def _from_workspace(fl_ctx: FLContext, read: Callable[[Any], Any]) -> Any:
    try:
        engine = fl_ctx.get_engine()
        workspace = engine.get_workspace() if engine is not None else _prop(fl_ctx, FLContextKey.WORKSPACE_OBJECT)
        return read(workspace) if workspace is not None else None
    except Exception as error:  # noqa: BLE001 - a context without a usable workspace is a context without one
        report("context", error, "cannot find the server's workspace")
        return None


def _prop(fl_ctx: FLContext, key: str) -> Any:
    return fl_ctx.get_prop(key, None)


def _task(fl_ctx: FLContext, relay: bool) -> dict[str, Scalar]:
    names = {"client": peer_name(fl_ctx), "task": _prop(fl_ctx, FLContextKey.TASK_NAME)}
    names["task_id"] = _prop(fl_ctx, FLContextKey.TASK_ID)
    return {key: str(value)[:MAX_TEXT] for key, value in names.items() if isinstance(value, str) and value}


def _submission(fl_ctx: FLContext, relay: bool) -> dict[str, Scalar]:
    attrs = _task(fl_ctx, relay)
    result = _prop(fl_ctx, FLContextKey.TASK_RESULT)
    if isinstance(result, Shareable):
        attrs["return_code"] = str(result.get_return_code())
    return attrs


def _round(fl_ctx: FLContext, relay: bool) -> dict[str, Scalar]:
    current, total = _prop(fl_ctx, AppConstants.CURRENT_ROUND), _prop(fl_ctx, AppConstants.NUM_ROUNDS)
    attrs: dict[str, Scalar] = {}
    if isinstance(current, int):
        attrs["round"] = current + 1  # NVFLARE counts from 0, everybody else from 1
    if isinstance(total, int):
        attrs["total_rounds"] = total
    if relay:
        attrs |= _awaited(fl_ctx)
    return attrs


def _awaited(fl_ctx: FLContext) -> dict[str, Scalar]:
    """The clients that a round begins with. What FLIP's controller counted of the last round is taken back."""
    for prop in FlipProps:
        fl_ctx.set_prop(prop.value, None, private=True, sticky=True)
    clients = getattr(fl_ctx.get_engine(), "get_clients", None)
    return {"expected": len(clients())} if callable(clients) else {}


def _round_done(fl_ctx: FLContext, relay: bool) -> dict[str, Scalar]:
    counts = {
        "returned": _prop(fl_ctx, FlipProps.ROUND_RETURNED.value),
        "expected": _prop(fl_ctx, FlipProps.ROUND_EXPECTED.value),
    }
    return {key: value for key, value in counts.items() if isinstance(value, int)}


def _contribution(fl_ctx: FLContext, relay: bool) -> dict[str, Scalar]:
    accepted = _prop(fl_ctx, AppConstants.AGGREGATION_ACCEPTED)
    attrs: dict[str, Scalar] = {"client": peer_name(fl_ctx)}
    if isinstance(accepted, bool):
        attrs["accepted"] = accepted
    if relay:
        attrs["size_bytes"] = _payload_bytes(_prop(fl_ctx, AppConstants.TRAINING_RESULT))
    return attrs


def _payload_bytes(value: Any, depth: int = 6) -> int:
    """Bytes of the arrays in a result (anything with ``nbytes``), without copying or importing a framework."""
    size = getattr(value, "nbytes", None)
    if isinstance(size, int):
        return size
    if isinstance(value, bytes | bytearray):
        return len(value)
    if depth == 0:
        return 0
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(_payload_bytes(part, depth - 1) for part in parts)


def _named(key: str) -> Callable[[FLContext, bool], dict[str, Scalar]]:
    def read(fl_ctx: FLContext, relay: bool) -> dict[str, Scalar]:
        name = _prop(fl_ctx, key)
        return {"client": name[:MAX_TEXT]} if isinstance(name, str) else {}

    return read


def _end_near(fl_ctx: FLContext, relay: bool) -> dict[str, Scalar]:
    return {"aborted": True} if is_aborted(fl_ctx) else {}


def _receipt(fl_ctx: FLContext, relay: bool) -> dict[str, Scalar]:
    values = {key: _prop(fl_ctx, prop) for key, prop in RESULT_PROPS.items()}
    return {key: value for key, value in values.items() if isinstance(value, int | str)}


def _metric(fl_ctx: FLContext, relay: bool) -> dict[str, Scalar]:
    metric = metric_of(fl_ctx) or {}
    return {key: metric[key] for key in ("client", "label", "value") if key in metric}


_READERS: dict[str, Callable[[FLContext, bool], dict[str, Scalar]]] = {
    FlareEvents.AFTER_TASK_DATA_FILTER.value: _task,
    FlareEvents.BEFORE_PROCESS_SUBMISSION.value: _submission,
    FlareEvents.ROUND_STARTED.value: _round,
    FlareEvents.ROUND_DONE.value: _round_done,
    FlareEvents.AFTER_CONTRIBUTION_ACCEPT.value: _contribution,
    FlareEvents.CLIENT_DISCONNECTED.value: _named(FLContextKey.DISCONNECTED_CLIENT_NAME),
    FlareEvents.CLIENT_RECONNECTED.value: _named(FLContextKey.RECONNECTED_CLIENT_NAME),
    FlareEvents.ABOUT_TO_END_RUN.value: _end_near,
    FlipEvents.RESULTS_UPLOAD_COMPLETED.value: _receipt,
    FlipEvents.SEND_RESULT.value: _metric,
}
