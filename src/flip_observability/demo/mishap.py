"""The component that makes a demo run go wrong in a chosen round."""

from __future__ import annotations

import time
from pathlib import Path

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

from flip_observability.demo.scenarios import OUTAGE_DONE, OUTAGE_REQUEST


class Mishap(FLComponent):
    """Goes off once, when its round starts.

    Args:
        kind: ``panic`` (a fatal system error), ``abort`` (what an administrator's abort command does in the job
            process), or ``hub-outage`` (the demo is asked to take its hub down, and waited for).
        round_number: 1-based.
        control_dir: folder in which the demo is asked, for ``hub-outage``.
    """

    def __init__(self, kind: str, round_number: int, control_dir: str = "") -> None:
        super().__init__()
        self.kind, self.round_number, self.control_dir = kind, round_number, control_dir
        self._happened = False

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type != AppEventType.ROUND_STARTED or self._happened:
            return
        if int(fl_ctx.get_prop(AppConstants.CURRENT_ROUND, 0)) + 1 != self.round_number:
            return
        self._happened = True
        {"panic": self._panic, "abort": self._abort, "hub-outage": self._hub_outage}[self.kind](fl_ctx)

    def _panic(self, fl_ctx: FLContext) -> None:
        self.system_panic(f"the demo's mishap in round {self.round_number}", fl_ctx)

    def _abort(self, fl_ctx: FLContext) -> None:
        fl_ctx.get_prop(FLContextKey.RUNNER).abort(fl_ctx)

    def _hub_outage(self, fl_ctx: FLContext) -> None:
        control = Path(self.control_dir)
        (control / OUTAGE_REQUEST).touch()
        deadline = time.monotonic() + 30.0
        while not (control / OUTAGE_DONE).exists():
            if time.monotonic() > deadline:
                self.log_error(fl_ctx, "the demo did not take its hub down", fire_event=False)
                return
            time.sleep(0.02)
