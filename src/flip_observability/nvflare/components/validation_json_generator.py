"""The results of cross-site validation as one JSON file among the run's results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nvflare.apis.dxo import DXO, get_leaf_dxos
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants

from flip_observability.nvflare.components._json_generator import JsonGenerator


class ValidationJsonGenerator(JsonGenerator):
    """Writes ``{client that validated: {model that was validated: metrics}}``.

    A component of the job's ``config_fed_server.json``, driven by ``ServerEventHandler``. A reply may also be a
    collection of the results of several sites, as a client sends it that stands for others: each is kept under the
    name that NVFLARE gives it.

    Args:
        results_dir: folder of the file, relative to the run directory and inside it.
        json_file_name: name of the file.
    """

    def __init__(
        self, results_dir: str = AppConstants.CROSS_VAL_DIR, json_file_name: str = "cross_val_results.json"
    ) -> None:
        super().__init__(results_dir, json_file_name)
        self._val_results: dict[str, Any] = {}

    def _results(self) -> dict[str, Any]:
        return self._val_results

    def _parts(self, client: str, dxo: DXO) -> tuple[Mapping[str, DXO], int]:
        leaves, errors = get_leaf_dxos(dxo, client)
        return leaves, len(errors)

    def _keep(self, fl_ctx: FLContext, client: str, dxo: DXO) -> None:
        owner = fl_ctx.get_prop(AppConstants.MODEL_OWNER, None)
        if not owner:
            self._refuse(fl_ctx, "model_owner unknown")
            return
        with self._lock:
            self._val_results.setdefault(client, {})[str(owner)] = dxo.data
