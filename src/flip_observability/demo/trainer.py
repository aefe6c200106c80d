"""What the demo trains: logistic regression on scikit-learn's Wisconsin breast-cancer data, as NVFLARE components.

The data is split unevenly over the sites and a part of it is held out for the server, always in the same way.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.executor import Executor
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import ModelLearnable, ModelLearnableKey, make_model_learnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType
from nvflare.app_common.model_desc import ModelDescriptor

from flip_observability import FLIP
from flip_observability.constants import FlipEvents, FlipMetricsLabel
from flip_observability.demo.scenarios import GLOBAL_ACCURACY, GLOBAL_METRICS_FILE, LOG_FILE, MODEL_FILE

SITES = ("site-1", "site-2", "site-3")
SHARES = (0.6, 0.3, 0.1)
"""How the training data is split over :data:`SITES`."""

HELD_OUT = 0.2
SEED = 20240229
WEIGHTS = "weights"

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Samples:
    """Standardised features with a column of ones, and labels of 0 or 1."""

    features: Array
    labels: Array

    def __len__(self) -> int:
        return len(self.labels)


def load_data() -> dict[str, Samples]:
    """The data of each of :data:`SITES`, and of the server under the name ``server``: the held-out part."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    features = np.asarray(data.data, dtype=np.float64)
    features = (features - features.mean(axis=0)) / features.std(axis=0)
    features = np.hstack([features, np.ones((len(features), 1))])
    labels = np.asarray(data.target, dtype=np.float64)
    order = np.random.default_rng(SEED).permutation(len(labels))
    held_out = int(len(order) * HELD_OUT)
    training = len(order) - held_out
    bounds = [held_out + round(training * share) for share in np.cumsum(SHARES)[:-1]]
    parts = np.split(order, [held_out, *bounds])
    return {name: Samples(features[part], labels[part]) for name, part in zip(("server", *SITES), parts, strict=True)}


def initial_weights() -> Array:
    """Small random weights for the 30 features and the constant, always the same: the first model knows nothing."""
    return np.random.default_rng(0).normal(0.0, 0.3, 31)


def probabilities(weights: Array, samples: Samples) -> Array:
    """The model's probability of label 1 for each sample."""
    result: Array = 1.0 / (1.0 + np.exp(-np.clip(samples.features @ weights, -30.0, 30.0)))
    return result


def accuracy(weights: Array, samples: Samples) -> float:
    """Share of samples that are classified rightly, 0 to 1."""
    return float(np.mean((probabilities(weights, samples) > 0.5) == (samples.labels > 0.5)))


def loss(weights: Array, samples: Samples) -> float:
    """Mean cross-entropy."""
    p = np.clip(probabilities(weights, samples), 1e-9, 1.0 - 1e-9)
    return float(-np.mean(samples.labels * np.log(p) + (1.0 - samples.labels) * np.log(1.0 - p)))


def train(weights: Array, samples: Samples, steps: int, rate: float) -> Array:
    """Gradient descent on a site's samples."""
    for _ in range(steps):
        error = probabilities(weights, samples) - samples.labels
        weights = weights - rate * (samples.features.T @ error) / len(samples)
    return weights


class Trainer(Executor):
    """A site's part: evaluates the global model on its own data, trains it further, sends loss and accuracy.

    Args:
        steps: of gradient descent per round.
        rate: learning rate.
        pace: seconds that a round of training is made to last on the largest site, the others by their share of the
            data, so that the live view can be followed; 0 for as fast as it goes.
    """

    def __init__(self, steps: int = 10, rate: float = 0.1, pace: float = 0.0) -> None:
        super().__init__()
        self.steps, self.rate, self.pace = steps, rate, pace
        self._samples: Samples | None = None

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        if task_name != AppConstants.TASK_TRAIN:
            return make_reply(ReturnCode.TASK_UNKNOWN)
        started = time.monotonic()
        site = fl_ctx.get_identity_name()
        if self._samples is None:
            self._samples = load_data()[site]
        current = int(shareable.get_header(AppConstants.CURRENT_ROUND, 0))
        weights = np.asarray(from_shareable(shareable).data[WEIGHTS], dtype=np.float64)
        self._send(fl_ctx, "ACCURACY", accuracy(weights, self._samples), current + 1)
        weights = train(weights, self._samples, self.steps, self.rate)
        self._send(fl_ctx, str(FlipMetricsLabel.LOSS_FUNCTION), loss(weights, self._samples), current + 1)
        last = started + self.pace * SHARES[SITES.index(site)] / max(SHARES)
        while time.monotonic() < last:
            if abort_signal.triggered:
                return make_reply(ReturnCode.TASK_ABORTED)
            time.sleep(0.02)
        meta = {MetaKey.NUM_STEPS_CURRENT_ROUND: len(self._samples), MetaKey.CURRENT_ROUND: current}
        return DXO(DataKind.WEIGHTS, data={WEIGHTS: weights}, meta=meta).to_shareable()

    def _send(self, fl_ctx: FLContext, label: str, value: float, current: int) -> None:
        """Report a metric the way FLIP's trainers do."""
        dxo = DXO(DataKind.METRICS, data={"label": label, "value": value, "round": current})
        self.fire_fed_event(str(FlipEvents.SEND_RESULT), dxo.to_shareable(), fl_ctx)


class NumpyPersistor(ModelPersistor):
    """Keeps the global model as ``models/FL_global_model.npz`` in the run directory."""

    def _file(self, fl_ctx: FLContext) -> Path:
        return _run_dir(fl_ctx) / MODEL_FILE

    def load_model(self, fl_ctx: FLContext) -> ModelLearnable:
        file = self._file(fl_ctx)
        weights = initial_weights()
        if file.exists():
            with np.load(file) as stored:
                weights = stored[WEIGHTS]
        return make_model_learnable({WEIGHTS: weights}, {})

    def save_model(self, model: ModelLearnable, fl_ctx: FLContext) -> None:
        file = self._file(fl_ctx)
        file.parent.mkdir(exist_ok=True)
        np.savez(file, weights=np.asarray(model[ModelLearnableKey.WEIGHTS][WEIGHTS]))

    def get_model_inventory(self, fl_ctx: FLContext) -> Mapping[str, ModelDescriptor]:
        """The models there are, by file name."""
        file = self._file(fl_ctx)
        return {file.name: ModelDescriptor(file.name, str(file), "npz")} if file.exists() else {}


class GlobalEvaluator(FLComponent):
    """Measures each round's global model on the held-out samples, as soon as it has been persisted.

    The hub is told, and ``global_metrics.jsonl`` in the run directory has a line per round:
    ``{"round": 1-based, "accuracy": 0 to 1, "time": seconds since the epoch}``.

    Args:
        model_id: the model's UUID.
        persistor_id: id of the component that has the model.
    """

    def __init__(self, model_id: str, persistor_id: str = "persistor") -> None:
        super().__init__()
        self.model_id, self.persistor_id = model_id, persistor_id
        self._samples: Samples | None = None
        self._round = 0

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == AppEventType.ROUND_STARTED:
            self._round = int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND, 0)) + 1
        elif event_type == AppEventType.AFTER_LEARNABLE_PERSIST:
            self._evaluate(fl_ctx)

    def _evaluate(self, fl_ctx: FLContext) -> None:
        if self._samples is None:
            self._samples = load_data()["server"]
        persistor: Any = fl_ctx.get_engine().get_component(self.persistor_id)
        weights = persistor.load_model(fl_ctx)[ModelLearnableKey.WEIGHTS][WEIGHTS]
        value = accuracy(weights, self._samples)
        self.log_info(fl_ctx, f"Round {self._round}: global accuracy {value:.4f} on {len(self._samples)} samples")
        line = {"round": self._round, "accuracy": value, "time": time.time()}
        with (_run_dir(fl_ctx) / GLOBAL_METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        FLIP().send_metrics("server", self.model_id, GLOBAL_ACCURACY, value, self._round)


class RunLog(FLComponent):
    """Writes the process's log into the run directory too, as a real server's job process does; listed first."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:
            handler = logging.FileHandler(_run_dir(fl_ctx) / LOG_FILE, encoding="utf-8")
            handler.setFormatter(logging.Formatter("%(asctime)s - %(name)s - %(levelname)s - %(message)s"))
            logging.getLogger().addHandler(handler)


def _run_dir(fl_ctx: FLContext) -> Path:
    return Path(fl_ctx.get_workspace().get_run_dir(fl_ctx.get_job_id()))
