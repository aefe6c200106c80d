"""A controller that speaks to the hub by itself, as FLIP's do: under ``flip.nvflare.controllers`` in a job of a test.

It sends every accepted contribution and every metric of a client with an HTTP client of its own, while the run goes on.
"""

from __future__ import annotations

import os
from typing import Any

import requests
from nvflare.apis.dxo import from_shareable
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from flip_observability.constants import FlipEvents
from flip_observability.demo.workflows import AnnouncedScatterAndGather


class StandIn(AnnouncedScatterAndGather):
    """ScatterAndGather with the calls of FLIP's."""

    def _accept_train_result(self, client_name: str, result: Shareable, fl_ctx: FLContext, **more: Any) -> bool:
        accepted = super()._accept_train_result(client_name, result, fl_ctx, **more)
        if accepted:
            body: dict[str, Any] = dict.fromkeys(("fl_client_name", "log", "event_type", "global_round", "details"))
            body |= {"fl_client_name": client_name, "event_type": "CLIENT_RESULT_RECEIVED", "success": True}
            _post("logs", body | {"global_round": (self._current_round or 0) + 1})
        return bool(accepted)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Send a client's metric."""
        super().handle_event(event_type, fl_ctx)
        if event_type != FlipEvents.SEND_RESULT:
            return
        result = fl_ctx.get_prop(FLContextKey.EVENT_DATA)
        data = from_shareable(result).data
        number = (self._current_round or 0) + 1
        body = {"label": data["label"], "result": data["value"], "global_round": number, "x_value": float(number)}
        client = result.get_peer_prop(ReservedKey.IDENTITY_NAME, None)
        _post("metrics", body | {"fl_client_name": client, "x_label": "stand-in"})


def _post(path: str, body: dict[str, Any]) -> None:
    hub, model = os.environ["FLIP_API_INTERNAL_URL"], os.environ["STAND_IN_MODEL"]
    headers = {os.environ["INTERNAL_SERVICE_KEY_HEADER"]: os.environ["INTERNAL_SERVICE_KEY"]}
    requests.post(f"{hub}/model/{model}/{path}", json=body, headers=headers, timeout=10).raise_for_status()
