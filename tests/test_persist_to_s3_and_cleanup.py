"""The upload of a run's results, and what is removed after it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.model_desc import ModelDescriptor
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.job_config.api import FedJob

from flare_run import MODEL_ID, FolderClient, Run
from flip_observability.constants import FlipEvents
from flip_observability.nvflare.components import PersistToS3AndCleanup
from flip_observability.results import Receipt, ResultsUploadError

STARTED, COMPLETED = FlipEvents.RESULTS_UPLOAD_STARTED.value, FlipEvents.RESULTS_UPLOAD_COMPLETED.value
NAME = "FL_global_model.pt"


class Persistor(ModelPersistor):
    def __init__(self, inventory: Any) -> None:
        super().__init__()
        self.inventory = inventory

    def get_model_inventory(self, fl_ctx: FLContext) -> Any:
        return self.inventory

    def load_model(self, fl_ctx: FLContext) -> None: ...

    def save_model(self, model: Any, fl_ctx: FLContext) -> None: ...


@pytest.fixture
def run(tmp_path: Path) -> Run:
    run = Run(tmp_path / "workspace")
    location = str(run.dir / "app_server" / NAME)
    run.components["persistor"] = Persistor({NAME: ModelDescriptor(NAME, location, "pt")})
    (run.dir / "log.txt").write_text("all went well")
    (run.dir / "app_server" / NAME).write_bytes(b"weights")
    for folder in ("save", "transfer"):
        for model in (MODEL_ID, "another"):
            (run.root / folder / model).mkdir(parents=True)
            (run.root / folder / model / "app.py").touch()
    return run


@pytest.fixture
def client(tmp_path: Path) -> FolderClient:
    (tmp_path / "results").mkdir()
    return FolderClient(tmp_path / "results")


def submitted(run: Run, model_id: str = MODEL_ID) -> list[str]:
    return [folder for folder in ("save", "transfer") if (run.root / folder / model_id).exists()]


def test_the_surface_that_others_read(tmp_path: Path) -> None:
    one, another = FolderClient(tmp_path), FolderClient(tmp_path)
    component = PersistToS3AndCleanup(MODEL_ID)
    assert component.model_id == MODEL_ID
    assert component.persistor_id == "persistor"
    assert component.model_persistor is None
    assert component.model_inventory == {}
    assert component.model_dir == ""
    assert component.bucket_name == ""
    positional = PersistToS3AndCleanup(MODEL_ID.upper(), "other", one)
    assert (positional.model_id, positional.persistor_id, positional.flip) == (MODEL_ID, "other", one)
    positional.flip = another
    assert positional.flip is another


def test_results_are_uploaded_then_the_submitted_app_is_removed(run: Run, client: FolderClient, tmp_path: Path) -> None:
    calls: list[Any] = run.recorder.heard  # events and calls in one list, for their order
    client.calls = calls
    component = PersistToS3AndCleanup(MODEL_ID, flip=client)
    component.execute(run.context())
    assert [call[0] for call in calls] == [STARTED, "upload_results_to_s3", COMPLETED, "cleanup", "cleanup"]
    assert [tuple(call) for call in calls if call[0] == "upload_results_to_s3"] == [
        ("upload_results_to_s3", str(run.dir), MODEL_ID)
    ]
    assert [call[1] for call in calls if call[0] == "cleanup"] == [
        run.root / "save" / MODEL_ID,
        run.root / "transfer" / MODEL_ID,
    ]
    assert submitted(run) == []
    assert submitted(run, "another") == ["save", "transfer"]
    assert component.model_persistor is run.components["persistor"]
    assert component.model_dir == str(run.dir / "app_server" / NAME)
    assert list(component.model_inventory) == [NAME]
    (archive,) = (tmp_path / "results" / MODEL_ID).glob("*.zip")
    with ZipFile(archive) as content:
        assert content.read("log.txt") == b"all went well"
        assert content.read(NAME) == b"weights"
    assert (run.dir / "log.txt").exists()  # nothing of the run is moved or deleted


def test_the_receipt_is_in_the_context_of_the_completed_event(run: Run, client: FolderClient, tmp_path: Path) -> None:
    fl_ctx = run.context()
    PersistToS3AndCleanup(MODEL_ID, flip=client).execute(fl_ctx)
    (archive,) = (tmp_path / "results" / MODEL_ID).glob("*.zip")
    props = run.recorder.props(COMPLETED)
    assert props["flip.results.uri"] == archive.as_uri()
    assert props["flip.results.bytes"] == archive.stat().st_size
    with ZipFile(archive) as content:
        assert props["flip.results.files"] == sum(not name.endswith("/") for name in content.namelist())
    assert "flip.results.uri" not in run.recorder.props(STARTED)
    assert "flip.results.uri" not in fl_ctx.get_all_public_props()
    assert "flip.results.uri" not in run.context().get_prop_keys()  # of this context alone


class SilentClient(FolderClient):
    def upload_results_to_s3(self, results_folder: Any, model_id: str) -> Receipt | None:
        super().upload_results_to_s3(results_folder, model_id)
        return None


def test_a_client_that_gives_no_receipt(run: Run, client: FolderClient, tmp_path: Path) -> None:
    client = SilentClient(tmp_path / "results")
    PersistToS3AndCleanup(MODEL_ID, flip=client).execute(run.context())
    assert run.recorder.events == [STARTED, COMPLETED]
    assert not [key for key in run.recorder.props(COMPLETED) if key.startswith("flip.results")]


# -- the model id ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["not-a-uuid", "../x", "x" * 10_240, 7])
@pytest.mark.parametrize("accepts", [True, False])
def test_a_model_id_that_is_no_uuid_is_reported_and_refused(client: FolderClient, given: Any, accepts: bool) -> None:
    class Strict(FolderClient):
        def update_status(self, model_id: Any, status: Any) -> None:
            super().update_status(model_id, status)
            if not accepts:
                raise ValueError("Invalid model ID")

    strict = Strict(client.destination.directory or Path(), client.calls)
    with pytest.raises(ValueError, match="is not a valid UUID") as caught:
        PersistToS3AndCleanup(given, flip=strict)
    assert strict.calls == [("update_status", given, "ERROR")]
    assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match="is not a valid UUID"):
        PersistToS3AndCleanup(given)


@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_empty_model_id_is_found_when_it_is_needed(run: Run, client: FolderClient, empty: Any) -> None:
    component = PersistToS3AndCleanup(empty, flip=client)
    assert component.model_id == ""
    run.config_file.write_text(json.dumps({"FLIP_MODEL_ID": MODEL_ID.upper()}))
    component.execute(run.context())
    assert component.model_id == MODEL_ID
    assert submitted(run) == []
    assert client.called(["upload_results_to_s3"]) == [("upload_results_to_s3", str(run.dir), MODEL_ID)]


def test_without_any_model_id_nothing_is_uploaded_or_removed(run: Run, client: FolderClient) -> None:
    component = PersistToS3AndCleanup(flip=client)
    with pytest.raises(ValueError, match="No model id"):
        component.execute(run.context())
    with pytest.raises(ValueError, match="No model id"):
        component.upload_results_to_s3_bucket(run.context())
    component.cleanup(run.context())
    assert client.calls == []
    assert run.recorder.events == []
    assert submitted(run, "another") == ["save", "transfer"]


# -- what is missing ---------------------------------------------------------------------------------------------------


def test_without_an_engine_it_says_so_and_returns(client: FolderClient, caplog: pytest.LogCaptureFixture) -> None:
    component = PersistToS3AndCleanup(MODEL_ID, flip=client)
    fl_ctx = FLContext()
    component.execute(fl_ctx)
    assert str(fl_ctx.get_prop("__event_data__")).startswith("Engine not found")
    assert client.calls == []


@pytest.mark.parametrize("found", [None, FLComponent(), "a text"], ids=lambda found: type(found).__name__)
def test_what_is_no_persistor_panics_once_and_names_what_was_found(run: Run, client: FolderClient, found: Any) -> None:
    run.components["persistor"] = found
    PersistToS3AndCleanup(MODEL_ID, flip=client).execute(run.context())
    assert run.recorder.events == [EventType.FATAL_SYSTEM_ERROR]
    reason = run.recorder.props(EventType.FATAL_SYSTEM_ERROR)["__event_data__"]
    assert reason.startswith("'persistor_id' component must be ")
    assert type(found).__name__ in reason
    assert client.calls == []


def test_the_persistor_is_found_by_its_id(run: Run, client: FolderClient) -> None:
    run.components["mine"] = run.components.pop("persistor")
    PersistToS3AndCleanup(MODEL_ID, "mine", client).execute(run.context())
    assert run.recorder.events == [STARTED, COMPLETED]


@pytest.mark.parametrize("persistor", [Persistor({}), Persistor(None), NPModelPersistor()], ids=["{}", "None", "numpy"])
def test_a_persistor_of_another_framework_gets_a_warning_and_an_upload(
    run: Run, client: FolderClient, persistor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run.components["persistor"] = persistor
    component = PersistToS3AndCleanup(MODEL_ID, flip=client)
    component.execute(run.context())
    assert "Unable to retrieve" in caplog.text
    assert component.model_dir == ""
    assert run.recorder.events == [STARTED, COMPLETED]  # the warning fires no event


# -- failures ----------------------------------------------------------------------------------------------------------


class FailingClient(FolderClient):
    def __init__(self, folder: Path, error: BaseException, at: str) -> None:
        super().__init__(folder)
        self.error, self.at = error, at

    def upload_results_to_s3(self, results_folder: Any, model_id: str) -> Receipt | None:
        self._fail("upload")
        return super().upload_results_to_s3(results_folder, model_id)

    def cleanup(self, path: Path) -> None:
        self._fail("cleanup")
        super().cleanup(path)

    def _fail(self, at: str) -> None:
        if at in self.at:
            raise self.error


def failing(tmp_path: Path, error: BaseException, at: str) -> FailingClient:
    (tmp_path / "results").mkdir(exist_ok=True)
    return FailingClient(tmp_path / "results", error, at)


@pytest.mark.parametrize("at", ["upload", "upload, cleanup"])
def test_a_failed_upload_is_raised_again_with_its_text_after_the_cleanup(
    run: Run, tmp_path: Path, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = failing(tmp_path, RuntimeError("the bucket of patient 4711 refuses"), at)
    component = PersistToS3AndCleanup(MODEL_ID, flip=client)
    with pytest.raises(RuntimeError, match="the bucket of patient 4711 refuses"):
        component.upload_results_to_s3_bucket(run.context())
    assert submitted(run) == ([] if at == "upload" else ["save", "transfer"])
    with pytest.raises(Exception, match="the bucket of patient 4711 refuses"):
        component.execute(run.context())
    assert run.recorder.events == [STARTED]
    assert "Upload to the s3 bucket failed" in caplog.text
    assert "RuntimeError" in caplog.text
    assert "4711" not in caplog.text


def test_a_failed_upload_keeps_its_kind_and_the_results(run: Run, client: FolderClient) -> None:
    shutil.rmtree(run.dir / "app_server")
    target = client.destination.directory
    assert target is not None
    target.rmdir()
    target.touch()  # where the archive's folder should be made there is a file
    with pytest.raises(ResultsUploadError, match=r"^Unexpected failure uploading results to S3"):
        PersistToS3AndCleanup(MODEL_ID, flip=client).execute(run.context())
    assert (run.dir / "log.txt").exists()
    assert submitted(run) == []
    assert run.recorder.events == [STARTED]


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
@pytest.mark.parametrize("at", ["upload", "cleanup"])
def test_what_would_end_the_server_leaves_as_an_exception(
    run: Run, tmp_path: Path, error: BaseException, at: str
) -> None:
    component = PersistToS3AndCleanup(MODEL_ID, flip=failing(tmp_path, error, at))
    with pytest.raises(Exception, match=type(error).__name__) as caught:
        component.execute(run.context())
    assert isinstance(caught.value, Exception)
    assert caught.value.__cause__ is error


def test_a_persistor_that_fails_leaves_as_it_was_raised(run: Run, client: FolderClient) -> None:
    run.components["persistor"] = Persistor(["no mapping"])
    with pytest.raises(AttributeError):
        PersistToS3AndCleanup(MODEL_ID, flip=client).execute(run.context())
    assert client.calls == []


def test_a_cleanup_that_fails_after_the_upload_is_raised(run: Run, tmp_path: Path) -> None:
    client = failing(tmp_path, OSError("Failed to clean up path"), "cleanup")
    with pytest.raises(OSError, match="Failed to clean up path"):
        PersistToS3AndCleanup(MODEL_ID, flip=client).execute(run.context())
    assert run.recorder.events == [STARTED, COMPLETED]


def test_what_is_overridden_is_called(run: Run, client: FolderClient) -> None:
    calls = []

    class Mine(PersistToS3AndCleanup):
        def upload_results_to_s3_bucket(self, fl_ctx: FLContext) -> None:
            calls.append("upload")

        def cleanup(self, fl_ctx: FLContext) -> None:
            calls.append("cleanup")

    Mine(MODEL_ID, flip=client).execute(run.context())
    assert calls == ["upload", "cleanup"]


# -- what may be removed -----------------------------------------------------------------------------------------------


def link_the_folder(run: Run, outside: Path) -> None:
    shutil.rmtree(run.root / "save" / MODEL_ID)
    (run.root / "save" / MODEL_ID).symlink_to(outside / MODEL_ID)


def link_its_parent(run: Run, outside: Path) -> None:
    shutil.rmtree(run.root / "save")
    (run.root / "save").symlink_to(outside)


@pytest.mark.parametrize("link", [link_the_folder, link_its_parent])
def test_links_out_of_the_workspace_are_not_followed(
    run: Run, client: FolderClient, tmp_path: Path, link: Callable[[Run, Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "outside" / MODEL_ID).mkdir(parents=True)
    link(run, tmp_path / "outside")
    PersistToS3AndCleanup(MODEL_ID, flip=client).cleanup(run.context())
    assert (tmp_path / "outside" / MODEL_ID).is_dir()
    assert client.calls == [("cleanup", run.root / "transfer" / MODEL_ID)]
    assert "it is not removed" in caplog.text


def test_a_workspace_that_is_itself_behind_a_link_is_cleaned(tmp_path: Path, client: FolderClient) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run = Run(tmp_path / "link")
    (run.root / "save" / MODEL_ID).mkdir(parents=True)
    PersistToS3AndCleanup(MODEL_ID, flip=client).cleanup(run.context())
    assert client.calls == [("cleanup", run.root / "save" / MODEL_ID)]
    assert submitted(run) == []


@pytest.mark.parametrize("model_id", ["", ".", "..", "another", f"../{MODEL_ID}"])
def test_no_folder_is_removed_for_a_model_id_that_is_no_uuid(run: Run, client: FolderClient, model_id: str) -> None:
    component = PersistToS3AndCleanup(MODEL_ID, flip=client)
    component.model_id = model_id
    component.cleanup(run.context())
    assert client.calls == []


def test_a_missing_folder_is_no_failure(run: Run, client: FolderClient) -> None:
    for folder in ("save", "transfer"):
        shutil.rmtree(run.root / folder)
    PersistToS3AndCleanup(MODEL_ID, flip=client).cleanup(run.context())
    assert client.calls == []


# -- the client object -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [None, "given"])
def test_an_exported_job_holds_the_arguments_and_no_client(
    tmp_path: Path, client: FolderClient, flip: str | None
) -> None:
    job = FedJob(name="export", min_clients=1)
    component = PersistToS3AndCleanup(MODEL_ID, "mine", client if flip else None)
    job.to_server(component, id="persist_and_cleanup")
    job.export_job(str(tmp_path))
    (config,) = tmp_path.rglob("config_fed_server.json")
    components = {entry["id"]: entry for entry in json.loads(config.read_text())["components"]}
    exported = components["persist_and_cleanup"]
    assert exported["args"] == {"model_id": MODEL_ID, "persistor_id": "mine"}
    assert exported["path"].endswith("PersistToS3AndCleanup")


def test_a_client_is_built_from_the_environment_when_it_is_first_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    component = PersistToS3AndCleanup(MODEL_ID)
    assert vars(component)["_hub_client"] is None
    monkeypatch.setenv("LOCAL_DEV", "true")
    first = component.flip
    assert callable(first.upload_results_to_s3)
    assert component.flip is first


@pytest.mark.parametrize("local_dev", [True, False])
def test_the_client_of_the_environment_uploads_and_cleans_up(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local_dev: bool
) -> None:
    monkeypatch.setenv("LOCAL_DEV", str(local_dev).lower())
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", "a key")
    monkeypatch.setenv("FLIP_OBSERVABILITY_DIR", str(tmp_path / "ledger"))
    monkeypatch.setenv("UPLOADED_FEDERATED_DATA_BUCKET", (tmp_path / "bucket").as_uri())
    PersistToS3AndCleanup(MODEL_ID).execute(run.context())
    assert run.recorder.events == [STARTED, COMPLETED]
    uri = run.recorder.props(COMPLETED)["flip.results.uri"]
    with ZipFile(uri.removeprefix("file://")) as archive:
        assert archive.read("log.txt") == b"all went well"
    # In development nothing is deleted; elsewhere the submitted app goes.
    assert submitted(run) == (["save", "transfer"] if local_dev else [])


def test_a_context_whose_engine_has_no_workspace(client: FolderClient, run: Run) -> None:
    class Engine:
        def get_component(self, component_id: str) -> Any:
            return run.components.get(component_id)

        def fire_event(self, event_type: str, fl_ctx: FLContext) -> None: ...

    fl_ctx = FLContextManager(engine=Engine(), job_id="a job").new_context()
    with pytest.raises(AttributeError):
        PersistToS3AndCleanup(MODEL_ID, flip=client).execute(fl_ctx)
    assert client.calls == []
