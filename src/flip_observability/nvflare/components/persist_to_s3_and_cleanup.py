"""The end of a run's results: uploaded from the run directory, and what the submitted app left behind removed."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants

from flip_observability.constants import FlipEvents
from flip_observability.nvflare.context import RESULT_PROPS
from flip_observability.nvflare.flip_client import UsesFlip
from flip_observability.nvflare.model_id import resolve_model_id
from flip_observability.utils import canonical_uuid

GLOBAL_MODEL = "FL_global_model.pt"
RECEIPT = {"uri": "uri", "bytes": "size", "files": "files", "crc32": "crc32"}
"""Attributes of an upload's receipt, by what the context tells of them."""
APP_FOLDERS = ("save", "transfer")
"""Folders of the workspace where the submitted app of a model was kept; they hold no results."""


class PersistToS3AndCleanup(UsesFlip, FLComponent):
    """Uploads the results of a run and removes the submitted app, when ``ServerEventHandler`` calls it at the end.

    A component of the job's ``config_fed_server.json``. The persistor can be of any framework: all that is asked of it
    is ``get_model_inventory(fl_ctx)``.

    Args:
        model_id: the model's UUID; when empty it is found in the job at the end (see ``resolve_model_id``).
        persistor_id: component that knows where the models are.
        flip: client object with ``upload_results_to_s3(results_folder, model_id)`` and ``cleanup(path)``; built from
            the environment, when first used, if None.

    Raises:
        ValueError: for a ``model_id`` that is given and is no UUID.
    """

    _called = "upload_results_to_s3"

    def __init__(
        self, model_id: str = "", persistor_id: str = AppConstants.DEFAULT_PERSISTOR_ID, flip: Any = None
    ) -> None:
        super().__init__()
        self.flip = flip
        self.model_id = self._accept_model_id(model_id)
        self.persistor_id = persistor_id
        self.model_persistor: Any = None
        self.model_inventory: dict[str, Any] = {}
        self.model_dir = ""
        self.bucket_name = ""

    def execute(self, fl_ctx: FLContext) -> None:
        """Upload the results of the run and clean up.

        Without an engine or a usable persistor it panics and returns.

        Raises:
            ResultsUploadError: the upload failed; the results are still in the run directory.
            Exception: anything else that went wrong, as it was raised. What is not an ``Exception``, such as
                ``SystemExit``, is wrapped in one, so that it ends the upload and not the server.
        """
        try:
            self._execute(fl_ctx)
        except BaseException as error:
            self._log_failure(fl_ctx, "Exception in PersistToS3AndCleanup", error)
            if isinstance(error, Exception):
                raise
            raise RuntimeError(f"{type(error).__name__} in PersistToS3AndCleanup") from error

    def upload_results_to_s3_bucket(self, fl_ctx: FLContext) -> None:
        """Upload the run directory. Where the client tells what became of it, the context's ``flip.results.*`` say it.

        Raises:
            BaseException: what the upload raised, after the clean-up.
        """
        try:
            self._require_model_id(fl_ctx)
            run_dir = fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id())
            self.log_info(fl_ctx, "Attempting to upload the results to the bucket...")
            receipt = self.flip.upload_results_to_s3(run_dir, self.model_id)
        except BaseException as error:
            self._log_failure(fl_ctx, "Upload to the s3 bucket failed. Attempting to cleanup", error)
            self._cleanup_after_failure(fl_ctx)
            raise
        self._tell(fl_ctx, receipt)

    def cleanup(self, fl_ctx: FLContext) -> None:
        """Remove the submitted app of this model from the workspace; results are elsewhere and stay.

        Raises:
            Exception: what the client raised for a folder that it cannot remove.
        """
        model_id = canonical_uuid(self.model_id)
        if model_id is None:  # any other name could lead anywhere
            self.log_warning(fl_ctx, "No model id: nothing is cleaned up", fire_event=False)
            return
        root = Path(fl_ctx.get_engine().get_workspace().get_root_dir())
        for folder in APP_FOLDERS:
            path = root / folder / model_id
            if not path.is_dir():
                continue
            if path.resolve() != root.resolve() / folder / model_id:
                self.log_warning(fl_ctx, f"A link leads to {folder}/{model_id}: it is not removed", fire_event=False)
                continue
            self.flip.cleanup(path)

    def _execute(self, fl_ctx: FLContext) -> None:
        engine = fl_ctx.get_engine()
        if not engine:
            self.system_panic("Engine not found. PersistToS3AndCleanup exiting.", fl_ctx)
            return
        self.model_persistor = engine.get_component(self.persistor_id)
        if not callable(getattr(self.model_persistor, "get_model_inventory", None)):
            self.system_panic(
                "'persistor_id' component must be a model persistor with 'get_model_inventory'. "
                f"But {self.persistor_id!r} is: {type(self.model_persistor)}",
                fl_ctx,
            )
            return
        self._find_model(fl_ctx)
        self._require_model_id(fl_ctx)
        self.fire_event(FlipEvents.RESULTS_UPLOAD_STARTED.value, fl_ctx)
        self.upload_results_to_s3_bucket(fl_ctx)
        self.fire_event(FlipEvents.RESULTS_UPLOAD_COMPLETED.value, fl_ctx)
        self.cleanup(fl_ctx)
        self.log_info(fl_ctx, "PersistToS3AndCleanup completed")

    def _find_model(self, fl_ctx: FLContext) -> None:
        # NVFLARE's abstract persistor gives None.
        self.model_inventory = self.model_persistor.get_model_inventory(fl_ctx) or {}
        model = self.model_inventory.get(GLOBAL_MODEL)
        if model is not None:
            self.model_dir = model.location
            self.log_info(fl_ctx, f"Model dir: {self.model_dir}")
            return
        self.log_warning(
            fl_ctx,
            f"Unable to retrieve the details of the aggregated model {GLOBAL_MODEL} from the persistor. "
            "What is in the run directory is uploaded.",
            fire_event=False,
        )

    def _require_model_id(self, fl_ctx: FLContext) -> None:
        self.model_id = resolve_model_id(fl_ctx, self.model_id) or ""
        if not self.model_id:
            raise ValueError("No model id: the results stay in the run directory, because they cannot be named")

    def _cleanup_after_failure(self, fl_ctx: FLContext) -> None:
        """Clean up without hiding why the upload failed."""
        try:
            self.cleanup(fl_ctx)
        except Exception as error:  # noqa: BLE001 - the failed upload is what must reach the caller
            self._log_failure(fl_ctx, "Clean-up after the failed upload failed too", error)

    def _tell(self, fl_ctx: FLContext, receipt: Any) -> None:
        """Leave in the context what became of the upload, for whoever hears RESULTS_UPLOAD_COMPLETED."""
        for name, attribute in RECEIPT.items():
            value = getattr(receipt, attribute, None)
            if isinstance(value, str | int):
                fl_ctx.set_prop(RESULT_PROPS[name], value, private=True, sticky=False)

    def _log_failure(self, fl_ctx: FLContext, what: str, error: BaseException) -> None:
        # Where it happened and of which kind; a message can quote what patients' data went through it.
        frames = "".join(traceback.format_tb(error.__traceback__))
        self.log_error(fl_ctx, f"{what} ({type(error).__name__}):\n{frames}", fire_event=False)
