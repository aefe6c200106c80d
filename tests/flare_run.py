"""A run of NVFLARE's without its processes: the real engine of a job, its workspace, contexts and events."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable
from nvflare.apis.workspace import Workspace
from nvflare.app_common.app_constant import AppConstants
from nvflare.private.fed.server.run_manager import RunManager

from flip_observability.results import Destination, Receipt, upload_results

JOB_ID = "5e0c9a38-54a1-4b6d-9d4e-1f2f30a94a10"
MODEL_ID = "0f8fad5b-d9cb-469f-a165-70867728950e"


class Recorder(FLComponent):
    """Keeps the events it hears, with what their contexts said."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[tuple[str, dict[str, Any]]] = []

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        self.heard.append((event_type, {key: fl_ctx.get_prop(key) for key in fl_ctx.get_prop_keys()}))

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.heard]

    def props(self, event_type: str) -> dict[str, Any]:
        return next(props for event, props in self.heard if event == event_type)


class Run:
    """One run: ``<root>/startup``, ``<root>/local``, ``<root>/<job id>`` and the engine of its job process."""

    def __init__(self, root: Path, job_id: str = JOB_ID, meta: dict[str, Any] | None = None) -> None:
        for folder in ("startup", "local", f"{job_id}/app_server/config", f"{job_id}/app_server/custom"):
            (root / folder).mkdir(parents=True)
        self.root, self.job_id = root, job_id
        self.dir = root / job_id
        self.meta_file = self.dir / "meta.json"
        self.config_file = self.dir / "app_server" / "custom" / "config.json"
        self.meta_file.write_text(json.dumps({"name": "a job", **(meta or {})}))
        self.recorder = Recorder()
        self.components: dict[str, Any] = {}
        self.engine = RunManager(
            server_name="server",
            engine=None,
            job_id=job_id,
            workspace=Workspace(str(root), "server"),
            components=self.components,
            handlers=[self.recorder],
        )
        self.engine.fl_ctx_mgr.engine = self.engine

    def context(self, **props: Any) -> FLContext:
        """A new context of the run, with private props of its own."""
        fl_ctx = self.engine.new_context()
        for key, value in props.items():
            fl_ctx.set_prop(key, value, private=True, sticky=False)
        return fl_ctx

    def context_without_meta(self) -> FLContext:
        """A new context that knows the engine and the job id, and nothing of the job's metadata."""
        return FLContextManager(engine=self.engine, identity_name="server", job_id=self.job_id).new_context()

    def result(self, client: Any, result: Any, owner: Any = None) -> FLContext:
        """The context of a validation result."""
        props = {
            AppConstants.DATA_CLIENT: client,
            AppConstants.MODEL_OWNER: owner,
            AppConstants.VALIDATION_RESULT: result,
        }
        return self.context(**{key: value for key, value in props.items() if value is not None})


def metrics(**values: Any) -> Shareable:
    """A client's validation result."""
    return DXO(data_kind=DataKind.METRICS, data=values).to_shareable()


class FolderClient:
    """A client object of a job's own, as FLIP's code passes them: results go to a folder, by the real upload."""

    def __init__(self, folder: Path, calls: list[Any] | None = None) -> None:
        self.destination = Destination.parse(folder.as_uri())
        self.calls: list[Any] = [] if calls is None else calls

    def update_status(self, model_id: Any, status: Any) -> None:
        self.calls.append(("update_status", model_id, str(status)))

    def upload_results_to_s3(self, results_folder: Any, model_id: str) -> Receipt | None:
        self.calls.append(("upload_results_to_s3", results_folder, model_id))
        return upload_results(Path(results_folder), self.destination, model_id)

    def cleanup(self, path: Path) -> None:
        self.calls.append(("cleanup", path))
        shutil.rmtree(path)

    def called(self, names: Iterable[str]) -> list[Any]:
        return [call for call in self.calls if call[0] in names]
