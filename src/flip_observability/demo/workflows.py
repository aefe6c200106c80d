"""NVFLARE's workflows, which announce a training to FLIP before it begins, as FLIP's own controllers do."""

from __future__ import annotations

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_common.workflows.scatter_and_gather import ScatterAndGather

from flip_observability.constants import FlipEvents


class AnnouncedFedAvg(FedAvg):
    """FedAvg on NVFLARE's Model Controller API."""

    def start_controller(self, fl_ctx: FLContext) -> None:
        self.fire_event(str(FlipEvents.TRAINING_INITIATED), fl_ctx)
        super().start_controller(fl_ctx)


class AnnouncedScatterAndGather(ScatterAndGather):
    """ScatterAndGather."""

    def start_controller(self, fl_ctx: FLContext) -> None:
        self.fire_event(str(FlipEvents.TRAINING_INITIATED), fl_ctx)
        super().start_controller(fl_ctx)
