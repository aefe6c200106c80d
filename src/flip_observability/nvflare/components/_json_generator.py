"""What the two generators of result files share: forget at the start, keep what arrives, write at the end."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.utils.file_utils import resolve_path_under_root

from flip_observability.constants import FlareEvents
from flip_observability.utils import safe_text

MAX_DEPTH = 8
"""Levels of nesting that are written; metrics have one or two."""


class JsonGenerator(FLComponent):
    """Writes the metrics of a run's clients to one JSON file in the run directory.

    It is driven by ``ServerEventHandler`` through :meth:`handle_evaluation_events`, so that the file exists before the
    results are packed; by itself it handles no event.

    Args:
        results_dir: folder of the file, relative to the run directory and inside it.
        json_file_name: name of the file.
    """

    _HANDLERS: ClassVar[dict[str, str]] = {
        FlareEvents.START_RUN.value: "_forget",
        FlareEvents.VALIDATION_RESULT_RECEIVED.value: "_receive",
        FlareEvents.END_RUN.value: "_write",
    }

    def __init__(self, results_dir: str, json_file_name: str) -> None:
        super().__init__()
        self._results_dir = results_dir
        self._json_file_name = json_file_name
        self._lock = threading.RLock()

    def handle_evaluation_events(self, event_type: str, fl_ctx: FLContext) -> None:
        """Take one event of the run; most are none of this component's.

        Raises:
            OSError: the file cannot be written, at END_RUN.
            ValueError: the file would not be inside the run directory, at END_RUN.
        """
        handler = self._HANDLERS.get(event_type)
        if handler is not None:
            getattr(self, handler)(fl_ctx)

    def _results(self) -> dict[str, Any]:
        raise NotImplementedError

    def _keep(self, fl_ctx: FLContext, client: str, dxo: DXO) -> None:
        raise NotImplementedError

    def _refused(self, fl_ctx: FLContext, client: str, result: Any) -> None:
        """What a client sent is no result: called after it has been logged."""

    def _forget(self, fl_ctx: FLContext) -> None:
        with self._lock:
            self._results().clear()

    def _receive(self, fl_ctx: FLContext) -> None:
        client = fl_ctx.get_prop(AppConstants.DATA_CLIENT, None)
        result = fl_ctx.get_prop(AppConstants.VALIDATION_RESULT, None)
        if not client:
            self._refuse(fl_ctx, "data_client unknown")
        elif not result:
            self._refuse(fl_ctx, "Validation result not found")
        else:
            metrics = self._metrics(fl_ctx, str(client), result)
            if not metrics:
                self._refused(fl_ctx, str(client), result)
            for name, dxo in metrics.items():
                self._keep(fl_ctx, name, dxo)

    def _parts(self, client: str, dxo: DXO) -> tuple[Mapping[str, DXO], int]:
        """The parts of a reply by the client that each came from, and how many could not be read."""
        return {client: dxo}, 0

    def _metrics(self, fl_ctx: FLContext, client: str, result: Any) -> dict[str, DXO]:
        try:
            parts, unreadable = self._parts(client, from_shareable(result))
            kinds = {str(name): (dxo.data_kind, isinstance(dxo.data, dict), dxo) for name, dxo in parts.items()}
        except Exception as error:  # noqa: BLE001 - what a client sent can be anything, also no shareable at all
            # The type alone: messages about results can quote them.
            self._refuse(fl_ctx, f"Exception in handling validation result ({type(error).__name__})")
            return {}
        if unreadable:
            self._refuse(fl_ctx, f"{unreadable} parts of a collection cannot be read")
        metrics = {}
        for name, (kind, is_dict, dxo) in kinds.items():
            if kind == DataKind.METRICS and is_dict:
                metrics[name] = dxo
            else:
                told = str(getattr(kind, "value", kind))[:64]
                self._refuse(fl_ctx, f"Expected dxo of kind METRICS but got {told} instead")
        return metrics

    def _refuse(self, fl_ctx: FLContext, reason: str) -> None:
        self.log_error(fl_ctx, f"{safe_text(reason)}. The result will not be saved to json.", fire_event=False)

    def _write(self, fl_ctx: FLContext) -> None:
        self._write_file(fl_ctx, self._json_file_name, self._results())

    def _write_file(self, fl_ctx: FLContext, name: str, content: Any) -> None:
        engine = fl_ctx.get_engine()
        if engine is None:
            self.log_error(fl_ctx, f"Engine not found: {name} is not written.", fire_event=False)
            return
        run_dir = engine.get_workspace().get_run_dir(fl_ctx.get_job_id())
        relative = os.path.join(self._results_dir, name)
        path = Path(resolve_path_under_root(str(run_dir), relative, "results path"))
        with self._lock:
            text = json.dumps(to_json(content), indent=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_atomically(path, text)


def to_json(value: Any, depth: int = MAX_DEPTH) -> Any:
    """Turn what a client sent into what JSON can hold.

    Scalars of NumPy and its like become Python's. What JSON has no form for is named by its type and not shown, because
    an array among the metrics may be an image.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if depth and isinstance(value, Mapping):
        return {_key(key): to_json(item, depth - 1) for key, item in value.items()}
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [to_json(item, depth - 1) for item in value]
    scalar = _scalar(value)
    return str(type(value)) if scalar is None else scalar


def _key(key: Any) -> str:
    value = to_json(key, 0)
    return value if isinstance(value, str) else json.dumps(value)


def _scalar(value: Any) -> bool | float | str | None:
    """Python's form of a scalar of an array library; None for anything else."""
    try:
        item = value.item() if getattr(value, "shape", None) == () else None
    except Exception:  # noqa: BLE001 - an object of a client's making: then it is no scalar
        return None
    return item if isinstance(item, str | int | float) else None


def _write_atomically(path: Path, text: str) -> None:
    """Write a file so that whoever reads it, also after a kill, finds the old one or the new one, never half of one."""
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
