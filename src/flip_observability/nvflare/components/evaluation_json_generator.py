"""The results of an evaluation as one JSON file among the run's results, and whether there were any."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any, ClassVar

from nvflare.apis.dxo import DXO
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.app_common.app_constant import AppConstants

from flip_observability.constants import FlareEvents, FlipMetaKey, PTConstants
from flip_observability.nvflare.components._json_generator import MAX_DEPTH, JsonGenerator
from flip_observability.utils import safe_text

SERVER_MODEL = "SRV_"
"""What NVFLARE's cross-site evaluation puts before the name of a model of the server's."""


class EvaluationJsonGenerator(JsonGenerator):
    """Writes ``{client that evaluated: metrics}``, and what failed.

    An evaluation of several models names each result's model: then it is ``{client: {model: metrics}}``. Results for
    the file alone, which the reply's meta can hold, are merged into it, and the metrics win.

    A component of the job's ``config_fed_server.json``, driven by ``ServerEventHandler``.

    Args:
        results_dir: folder of the files, relative to the run directory and inside it.
        json_file_name: name of the file of results.
        failures_file_name: name of the file of tasks that failed, which is written even when there were none.
    """

    _HANDLERS: ClassVar[dict[str, str]] = {
        **JsonGenerator._HANDLERS,
        FlareEvents.AFTER_TASK_DATA_FILTER.value: "_task_assigned",
        FlareEvents.BEFORE_PROCESS_SUBMISSION.value: "_task_returned",
    }

    def __init__(
        self,
        results_dir: str = PTConstants.EvalDir,
        json_file_name: str = PTConstants.EvalResultsFilename,
        failures_file_name: str = PTConstants.EvalFailuresFilename,
    ) -> None:
        super().__init__(results_dir, json_file_name)
        self._failures_file_name = failures_file_name
        self._eval_results: dict[str, Any] = {}
        self._eval_failures: list[dict[str, Any]] = []
        self._replies: dict[str, dict[str | None, Any]] = {}
        self._tasks = 0
        self._succeeded = 0
        self._received = 0

    def all_tasks_failed(self) -> bool:
        """Say whether the evaluation had tasks and none of them succeeded.

        - Tasks are what clients were given (AFTER_TASK_DATA_FILTER): one that never comes back, because its client
          died or was too late, has failed. So has one whose result (BEFORE_PROCESS_SUBMISSION) has another return code
          than OK.
        - Where the controller hands on results for evaluation (VALIDATION_RESULT_RECEIVED), only usable metrics are
          success: a task that ended with OK and brought nothing that can be kept has evaluated nothing.
        - Without any task nothing has failed: that is another kind of job, or one that ended before it began.
        """
        with self._lock:
            if self._eval_results:
                return False
            return self._received > 0 or (self._tasks > 0 and self._succeeded == 0)

    def hub_metrics(self) -> dict[str, dict[str, float]]:
        """Give the metrics that the hub can plot, as ``{client: {label: finite number}}``.

        Nested keys are joined by ``/``, in upper case. When more than one model was evaluated, at any client, the
        model's name comes first, unless the reply is keyed by it already. Lists and what is no finite number are left
        out, and the log says which.
        """
        with self._lock:
            replies = {client: dict(by_model) for client, by_model in self._replies.items()}
            models = {model for by_model in replies.values() for model in by_model}
            models |= {failure["model"] for failure in self._eval_failures}
        several = len(models - {None}) > 1
        found: dict[str, dict[str, float]] = {}
        for client, by_model in replies.items():
            labels: dict[str, float] = {}
            left_out: set[str] = set()
            for model, reply in by_model.items():
                _flatten(reply, _prefix(model, reply, several), labels, left_out)
            if left_out:
                self.logger.warning(
                    "Not sent to the hub for %s, no finite numbers: %s", safe_text(client), safe_text(sorted(left_out))
                )
            if labels:
                found[client] = labels
        return found

    def _results(self) -> dict[str, Any]:
        return self._eval_results

    def _keep(self, fl_ctx: FLContext, client: str, dxo: DXO) -> None:
        model = _model_of(fl_ctx)
        entry = _merged(dxo.data, dxo.get_meta_prop(FlipMetaKey.SUPPLEMENTARY_RESULTS.value))
        with self._lock:
            self._replies.setdefault(client, {})[model] = dxo.data
            if model is None:
                self._eval_results[client] = entry
            else:
                self._eval_results.setdefault(client, {})[model] = entry

    def _metrics(self, fl_ctx: FLContext, client: str, result: Any) -> dict[str, DXO]:
        if _failure_of(result) is not None:
            return {}  # a failed task has no metrics to read: its return code says it all
        return super()._metrics(fl_ctx, client, result)

    def _refused(self, fl_ctx: FLContext, client: str, result: Any) -> None:
        code = _failure_of(result) or ReturnCode.EXECUTION_RESULT_ERROR
        model = _model_of(fl_ctx)
        with self._lock:
            self._eval_failures.append({"model": model, "client": client, "return_code": code})
        self.log_error(
            fl_ctx,
            f"Evaluation task failed (model={safe_text(model)}, client={safe_text(client)}, "
            f"return_code={safe_text(code)}). "
            f"Recorded in {self._failures_file_name}.",
            fire_event=False,
        )

    def _write(self, fl_ctx: FLContext) -> None:
        super()._write(fl_ctx)
        self._write_file(fl_ctx, self._failures_file_name, self._eval_failures)

    def _forget(self, fl_ctx: FLContext) -> None:
        with self._lock:
            super()._forget(fl_ctx)
            self._eval_failures.clear()
            self._replies.clear()
            self._tasks = self._succeeded = self._received = 0

    def _receive(self, fl_ctx: FLContext) -> None:
        with self._lock:
            self._received += 1
        super()._receive(fl_ctx)

    def _task_assigned(self, fl_ctx: FLContext) -> None:
        with self._lock:
            self._tasks += 1

    def _task_returned(self, fl_ctx: FLContext) -> None:
        result = fl_ctx.get_prop(FLContextKey.TASK_RESULT, None)
        # A result without a return code is a good one: NVFLARE itself takes it so.
        succeeded = isinstance(result, Shareable) and result.get_return_code(ReturnCode.OK) == ReturnCode.OK
        with self._lock:
            self._tasks = max(self._tasks, 1)  # a return is proof of a task, whatever was seen of its assignment
            self._succeeded += succeeded


def _model_of(fl_ctx: FLContext) -> str | None:
    owner = fl_ctx.get_prop(AppConstants.MODEL_OWNER, None)
    return str(owner) if owner else None


def _failure_of(result: Any) -> str | None:
    """The return code of a task that failed; None for anything else, also for what is no task's result at all."""
    if not isinstance(result, Shareable):
        return None
    code = result.get_return_code(ReturnCode.OK)
    return None if code in (None, ReturnCode.OK) else str(code)[:64]


def _merged(metrics: Any, more: Any) -> Any:
    """Both together, key by key; where both have something, the metrics' stays."""
    if not (isinstance(metrics, Mapping) and isinstance(more, Mapping)):
        return metrics
    both = {key: _merged(value, more.get(key)) for key, value in metrics.items()}
    return both | {key: value for key, value in more.items() if key not in both}


def _prefix(model: str | None, reply: Any, several: bool) -> tuple[str, ...]:
    name = (model or "").removeprefix(SERVER_MODEL)
    if not name or not several:
        return ()
    keyed_by_it = isinstance(reply, Mapping) and isinstance(reply.get(name), Mapping)
    return () if keyed_by_it else (name,)


def _flatten(value: Any, path: tuple[str, ...], labels: dict[str, float], left_out: set[str]) -> None:
    if isinstance(value, Mapping) and len(path) <= MAX_DEPTH:
        for key, item in value.items():
            _flatten(item, (*path, str(key)), labels, left_out)
    elif path:
        label = "/".join(path).upper()
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            left_out.add(label)
        else:
            labels[label] = float(value)
