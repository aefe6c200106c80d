"""The results of an evaluation as one JSON file among the run's results, and whether there were any."""

from __future__ import annotations

from typing import Any, ClassVar

from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from flip_observability.constants import FlareEvents
from flip_observability.nvflare.components._json_generator import JsonGenerator


class EvaluationJsonGenerator(JsonGenerator):
    """Writes ``{client that evaluated: metrics}``.

    A component of the job's ``config_fed_server.json``, driven by ``ServerEventHandler``.

    Args:
        results_dir: folder of the file, relative to the run directory and inside it.
        json_file_name: name of the file.
    """

    _HANDLERS: ClassVar[dict[str, str]] = {
        **JsonGenerator._HANDLERS,
        FlareEvents.AFTER_TASK_DATA_FILTER.value: "_task_assigned",
        FlareEvents.BEFORE_PROCESS_SUBMISSION.value: "_task_returned",
    }

    def __init__(
        self, results_dir: str = "evaluation_results", json_file_name: str = "evaluation_results.json"
    ) -> None:
        super().__init__(results_dir, json_file_name)
        self._eval_results: dict[str, Any] = {}
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

    def _results(self) -> dict[str, Any]:
        return self._eval_results

    def _keep(self, fl_ctx: FLContext, client: str, metrics: dict[str, Any]) -> None:
        with self._lock:
            self._eval_results[client] = metrics

    def _forget(self, fl_ctx: FLContext) -> None:
        with self._lock:
            super()._forget(fl_ctx)
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
