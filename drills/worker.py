"""A job process without NVFLARE's network: the real components, its real engine and contexts, events when it is told.

``python -m drills.worker ROOT JOB MODEL``: each line of standard input is a step, each line of standard output says
that one is done. The model is the demo's, trained in this process.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.model import make_model_learnable
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from drills.bench import CANARY
from drills.components import Ballast, Death, ServerEventHandler
from flare_run import Run
from flip_observability.constants import FlipEvents
from flip_observability.demo.trainer import WEIGHTS, GlobalEvaluator, NumpyPersistor, initial_weights, load_data, train
from flip_observability.nvflare.components import PersistToS3AndCleanup, ValidationJsonGenerator

STEPS_PER_ROUND = 10
ROUNDS = 60


class Quoting(ValidationJsonGenerator):
    """A generator of a researcher's, whose failures quote patients and all that its process knows."""

    def handle_evaluation_events(self, event_type: str, fl_ctx: FLContext) -> None:
        secrets = [os.environ.get(name, "") for name in ("INTERNAL_SERVICE_KEY", "AWS_SECRET_ACCESS_KEY")]
        raise RuntimeError(f"cannot write the results of {CANARY}", *secrets)


class Worker:
    """One run, step by step."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        model_id = arguments.model
        self.run = Run(arguments.root, arguments.job, {"custom_props": {"model_id": model_id}})
        self.signal = Signal()
        self.round = 0
        self.weights = initial_weights()
        self.samples = load_data()["site-1"]
        self.persistor = NumpyPersistor()
        generator = Quoting() if arguments.quoting else ValidationJsonGenerator()
        handler = ServerEventHandler(model_id)
        persist = PersistToS3AndCleanup(model_id)
        self.run.components.update(
            persistor=self.persistor, json_generator=generator, persist_and_cleanup=persist, handler=handler
        )
        parts: list[Any] = [GlobalEvaluator(model_id), persist]
        if arguments.megabytes:
            parts.append(Ballast(arguments.megabytes))
        if arguments.die_at:
            parts.append(Death(arguments.die_at))
        for part in (*parts, handler):
            self.run.engine.add_handler(part)
        self.files = logging.FileHandler(self.run.dir / "log.txt")
        logging.getLogger().addHandler(self.files)

    def fire(self, event: str, **props: Any) -> None:
        fl_ctx = self.run.context(**props)
        fl_ctx.set_prop(FLContextKey.RUN_ABORT_SIGNAL, self.signal, private=True, sticky=True)
        self.run.engine.fire_event(event, fl_ctx)

    def start(self) -> None:
        """Everything that precedes the first round."""
        workflow = {FLContextKey.WORKFLOW: "controller"}
        self.fire(EventType.START_RUN)
        self.fire(FlipEvents.TRAINING_INITIATED.value, **workflow)
        self.fire(AppEventType.INITIAL_MODEL_LOADED, **workflow)
        self.fire(EventType.START_WORKFLOW, **workflow)
        self.fire(AppEventType.TRAINING_STARTED, **workflow)

    def play_round(self) -> None:
        """A round: trained, persisted, measured."""
        props: Mapping[str, Any] = {
            FLContextKey.WORKFLOW: "controller",
            AppConstants.CURRENT_ROUND: self.round,
            AppConstants.NUM_ROUNDS: ROUNDS,
        }
        self.fire(AppEventType.ROUND_STARTED, **props)
        self.weights = train(self.weights, self.samples, STEPS_PER_ROUND, 0.1)
        self.fire(AppEventType.BEFORE_LEARNABLE_PERSIST, **props)
        self.persistor.save_model(make_model_learnable({WEIGHTS: self.weights}, {}), self.run.context())
        self.fire(AppEventType.AFTER_LEARNABLE_PERSIST, **props)
        self.fire(AppEventType.ROUND_DONE, **props)
        self.round += 1

    def abort(self) -> None:
        """What an administrator's command does here."""
        self.signal.trigger(True)

    def end(self) -> None:
        """The end of the run, in good order."""
        self.fire(EventType.END_WORKFLOW, **{FLContextKey.WORKFLOW: "controller"})
        self.fire(EventType.ABOUT_TO_END_RUN)
        self.fire(EventType.END_RUN)

    def panic(self) -> None:
        """A component gives up."""
        self.run.components["handler"].system_panic(f"no result for {CANARY}", self.run.context())

    def leave(self) -> None:
        """NVFLARE grants its threads a moment, and ends."""
        time.sleep(0.5)
        os._exit(0)


STEPS: Mapping[str, Callable[[Worker], None]] = {
    "start": Worker.start,
    "round": Worker.play_round,
    "abort": Worker.abort,
    "panic": Worker.panic,
    "end": Worker.end,
    "leave": Worker.leave,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m drills.worker")
    parser.add_argument("root", type=Path)
    parser.add_argument("job")
    parser.add_argument("model")
    parser.add_argument("--megabytes", type=int, default=0, help="of ballast in the results")
    parser.add_argument("--die-at", default="", help="an event")
    parser.add_argument("--quoting", action="store_true", help="with code that quotes patients in its exceptions")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is no answer
    worker = Worker(arguments)
    for line in sys.stdin:
        step = line.strip()
        begun = time.monotonic()
        STEPS[step](worker)
        answers.write(json.dumps({"step": step, "seconds": time.monotonic() - begun}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
