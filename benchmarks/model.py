"""The job that is measured: a model of the size that hospitals train, without its training, and a clock in the server.

Nothing of ours is imported here: the server that runs without our components runs this as well.
"""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

LAYERS = 161
PARAMETERS = 25_557_032
"""ResNet-50: its parameters (102 MB of float32) in its number of tensors."""
MODEL_FILE = "models/FL_global_model.npz"
OUR_THREADS = "flip-"
"""How the names of our threads begin."""

Weights = dict[str, npt.NDArray[np.float32]]


class Trainer(Executor):
    """Sends the model back, a little changed, and two metrics, as FLIP's trainers do."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        """One round of a site."""
        number = int(shareable.get_header(AppConstants.CURRENT_ROUND, 0))
        for label in ("ACCURACY", "LOSS_FUNCTION"):
            metric = DXO(DataKind.METRICS, data={"label": label, "value": 1 / (number + 1), "round": number + 1})
            self.fire_fed_event("_send_result", metric.to_shareable(), fl_ctx)
        weights = {name: layer * np.float32(0.999) for name, layer in from_shareable(shareable).data.items()}
        meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: 100, MetaKey.CURRENT_ROUND: number}
        return DXO(DataKind.WEIGHTS, data=weights, meta=meta).to_shareable()


class Persistor(ModelPersistor):
    """Keeps the model in the run's folder."""

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        """The first model."""
        weights = {f"layer_{number}": np.full(PARAMETERS // LAYERS, 0.1, np.float32) for number in range(LAYERS)}
        return make_model_learnable(weights, {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        """A round's model."""
        file = Path(fl_ctx.get_workspace().get_run_dir(fl_ctx.get_job_id())) / MODEL_FILE
        file.parent.mkdir(exist_ok=True)
        weights: Weights = model[ModelLearnableKey.WEIGHTS]
        np.savez(file, **weights)  # type: ignore[arg-type]


class Accounts(FLComponent):
    """Keeps account of the CPU time that components take: their import, their events, and their threads. Listed first.

    Args:
        paths: of the components' classes; none for a server without them.
    """

    spent: float = 0.0
    """Seconds of imports, events and ended threads so far, of this process."""
    _lock = threading.Lock()

    def __init__(self, paths: list[str]) -> None:
        super().__init__()
        if paths:
            begun = time.thread_time()
            parts = [path.rpartition(".") for path in paths]
            classes = [getattr(importlib.import_module(module), name) for module, _, name in parts]
            self._add(time.thread_time() - begun)
            for cls in classes:
                cls.handle_event = self._timed(cls.handle_event)
            run = threading.Thread.run
            timed_run = self._timed(run)
            threading.Thread.run = lambda thread: (timed_run if _is_ours(thread) else run)(thread)  # type: ignore[assignment, method-assign]

    @classmethod
    def _add(cls, seconds: float) -> None:
        with cls._lock:
            Accounts.spent += seconds

    @classmethod
    def _timed(cls, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                cls._add(time.thread_time() - begun)

        return timed

    @classmethod
    def total(cls) -> float:
        """Seconds, those of threads that live among them."""
        alive = [thread.ident for thread in threading.enumerate() if _is_ours(thread) and thread.ident]
        return cls.spent + sum(time.clock_gettime(time.pthread_getcpuclockid(ident)) for ident in alive)


def _is_ours(thread: threading.Thread) -> bool:
    return thread.name.startswith(OUR_THREADS)


class CpuTime(FLComponent):
    """Writes the CPU seconds of the server's process, and ours of them, at the start of each round and when END_RUN is
    over. Listed last.

    Args:
        file: where they are written.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self._file = file
        self._looks: list[dict[str, float]] = []

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Look at the clocks."""
        if event_type in (AppEventType.ROUND_STARTED, EventType.END_RUN):
            self._looks.append({"process": time.process_time(), "ours": Accounts.total()})
        if event_type == EventType.END_RUN:
            Path(self._file).write_text(json.dumps(self._looks), encoding="utf-8")
