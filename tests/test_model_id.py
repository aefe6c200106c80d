"""Where the model id of a run comes from, whatever a job may have written there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from nvflare.apis.fl_context import FLContext, FLContextManager

from flare_run import JOB_ID, MODEL_ID, Run
from flip_observability import errors
from flip_observability.nvflare.model_id import (
    MAX_BYTES,
    find_model,
    find_model_of_job,
    find_model_of_queued_job,
    model_id_of_job,
    model_id_of_run,
    resolve_model_id,
)

IN_CONFIG, IN_PROPS, IN_NAME = (f"{digit * 8}-0000-4000-8000-000000000000" for digit in "123")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    meta = {"name": IN_NAME, "custom_props": {"model_id": IN_PROPS}}
    run = Run(tmp_path, meta=meta)
    run.config_file.write_text(json.dumps({"FLIP_MODEL_ID": IN_CONFIG, "LOCAL_ROUNDS": 1}))
    return run


def test_the_sources_are_asked_in_their_order(run: Run) -> None:
    fl_ctx = run.context_without_meta()
    assert resolve_model_id(fl_ctx, MODEL_ID) == MODEL_ID
    assert resolve_model_id(fl_ctx, "") == IN_CONFIG
    assert model_id_of_run(run.dir) == IN_CONFIG
    run.config_file.unlink()
    assert resolve_model_id(fl_ctx) == IN_PROPS
    run.meta_file.write_text(json.dumps({"name": IN_NAME}))
    assert resolve_model_id(fl_ctx) == IN_NAME
    run.meta_file.write_text(json.dumps({"name": "a job"}))
    assert resolve_model_id(fl_ctx) is None


def test_sources_that_contradict_each_other_are_counted_logged_and_told_apart(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    found = find_model(run.context(), MODEL_ID)
    assert (found.model_id, set(found.lost)) == (MODEL_ID, {IN_CONFIG, IN_PROPS, IN_NAME})
    errors.drain()
    found.tell(JOB_ID)
    assert errors.drain() == {"model_id": 1}
    assert f"FLIP_MODEL_ID in custom/config.json names {IN_CONFIG}" in caplog.text
    in_the_parent = find_model_of_job(run.dir)
    assert (in_the_parent.model_id, in_the_parent.lost) == (IN_CONFIG, {IN_PROPS: ANY, IN_NAME: ANY})


def test_sources_that_agree_in_whatever_spelling_are_no_contradiction(run: Run) -> None:
    run.meta_file.write_text(json.dumps({"name": MODEL_ID.upper(), "custom_props": {"model_id": MODEL_ID}}))
    run.config_file.write_text(json.dumps({"FLIP_MODEL_ID": MODEL_ID.replace("-", "")}))
    found = find_model(run.context_without_meta(), MODEL_ID)
    assert (found.model_id, dict(found.lost)) == (MODEL_ID, {})
    errors.drain()
    found.tell(JOB_ID)
    assert errors.drain() == {}


def test_the_name_of_a_queued_job_counts_before_the_researchers_own_metadata() -> None:
    meta = {"name": IN_NAME, "custom_props": {"model_id": IN_PROPS}}
    found = find_model_of_queued_job(meta)
    assert (found.model_id, set(found.lost)) == (IN_NAME, {IN_PROPS})
    assert find_model_of_queued_job(meta | {"name": "a job"}).model_id == IN_PROPS
    assert find_model_of_queued_job({}).model_id is None


@pytest.mark.parametrize("argument", ["not-a-uuid", "../x", None, "x" * 10_240])
def test_an_argument_that_is_no_uuid_leaves_it_to_the_others(run: Run, argument: str | None) -> None:
    assert resolve_model_id(run.context(), argument) == IN_CONFIG


def test_every_source_may_spell_it_in_its_own_way_and_the_canonical_spelling_comes_out(run: Run) -> None:
    assert resolve_model_id(run.context(), "{" + MODEL_ID.upper() + "}") == MODEL_ID
    run.config_file.write_text(json.dumps({"FLIP_MODEL_ID": MODEL_ID.upper().replace("-", "")}))
    assert resolve_model_id(run.context()) == MODEL_ID


def test_the_contexts_own_metadata_stand_in_for_a_missing_file(run: Run) -> None:
    run.config_file.unlink()
    fl_ctx = run.context()
    run.meta_file.unlink()
    assert resolve_model_id(fl_ctx) == IN_PROPS
    assert resolve_model_id(run.context_without_meta()) is None
    assert model_id_of_run("", {"name": IN_NAME}) == IN_NAME


def test_contexts_that_lack_everything(tmp_path: Path) -> None:
    assert resolve_model_id(FLContext()) is None
    assert resolve_model_id(None) is None
    assert resolve_model_id(FLContext(), MODEL_ID.upper()) == MODEL_ID
    assert resolve_model_id(FLContextManager(engine=None, job_id=JOB_ID).new_context()) is None
    assert resolve_model_id(FLContextManager(engine=object(), job_id=JOB_ID).new_context()) is None
    run = Run(tmp_path)
    assert resolve_model_id(FLContextManager(engine=run.engine, job_id="").new_context()) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[]",
        b'"' + MODEL_ID.encode() + b'"',
        b'{"FLIP_MODEL_ID": null}',
        b'{"FLIP_MODEL_ID": ["x"]}',
        b'{"FLIP_MODEL_ID": "../../etc"}',
        b"[" * 200_000,
        b"9" * 10_000,
        b'{"FLIP_MODEL_ID": "' + MODEL_ID.encode() + b'"}' + b" " * MAX_BYTES,
    ],
    ids=lambda content: f"{content[:24]!r}",
)
def test_a_hostile_config_is_passed_over(run: Run, content: bytes) -> None:
    run.config_file.write_bytes(content)
    assert resolve_model_id(run.context()) == IN_PROPS


@pytest.mark.parametrize("props", [None, [], "x", {"model_id": {}}, {"model_id": 7}])
def test_hostile_metadata_are_passed_over(run: Run, props: Any) -> None:
    run.config_file.unlink()
    run.meta_file.write_text(json.dumps({"name": IN_NAME, "custom_props": props}))
    assert resolve_model_id(run.context_without_meta()) == IN_NAME


def test_a_config_that_is_a_link_is_not_followed(run: Run, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.json"
    run.config_file.rename(elsewhere)
    run.config_file.symlink_to(elsewhere)
    assert resolve_model_id(run.context()) == IN_PROPS


def test_a_folder_on_the_way_that_is_a_link_is_not_followed(run: Run, tmp_path: Path) -> None:
    custom = run.config_file.parent
    custom.rename(tmp_path / "elsewhere")
    custom.symlink_to(tmp_path / "elsewhere")
    assert resolve_model_id(run.context()) == IN_PROPS


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling", "loop", "device"])
def test_what_is_no_file_does_not_hold_the_run(run: Run, kind: str) -> None:
    path = run.config_file
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"dangling": "nowhere", "loop": path.name, "device": "/dev/zero"}[kind])
    assert resolve_model_id(run.context()) == IN_PROPS


# -- what the server's parent process finds ----------------------------------------------------------------------------


def configured(run: Run, text: str, name: str = "config_fed_server.json") -> Path:
    """Give the run's job a server configuration."""
    folder = Path(run.dir) / "app_server" / "config"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return folder / name


def with_argument(value: Any, **more: Any) -> str:
    handler = {
        "id": "h",
        "path": "flip_observability.nvflare.components.ServerEventHandler",
        "args": {"model_id": value},
    }
    return json.dumps({"components": [{"id": "p", "path": "a.B"}, handler], **more})


def test_parent_and_job_ask_the_same_sources_in_the_same_order(run: Run) -> None:
    file = configured(run, with_argument(MODEL_ID.upper()))
    fl_ctx = run.context_without_meta()
    assert model_id_of_job(run.dir) == resolve_model_id(fl_ctx, MODEL_ID.upper()) == MODEL_ID
    for argument in ("", None, "no-uuid", 7):
        file.write_text(with_argument(argument))
        assert model_id_of_job(run.dir) == resolve_model_id(fl_ctx, str(argument or "")) == IN_CONFIG
    run.config_file.unlink()
    assert model_id_of_job(run.dir) == resolve_model_id(fl_ctx) == IN_PROPS
    run.meta_file.write_text(json.dumps({"name": IN_NAME}))
    assert model_id_of_job(run.dir) == resolve_model_id(fl_ctx) == IN_NAME
    file.unlink()
    assert model_id_of_job(run.dir) == IN_NAME


def test_an_argument_that_refers_to_the_configurations_own_value(run: Run) -> None:
    configured(run, with_argument("{model_id}", model_id=MODEL_ID))
    assert model_id_of_job(run.dir) == MODEL_ID


HANDLER = "flip_observability.nvflare.components.ServerEventHandler"
NOT_FOR_THE_PARENT = {
    "HOCON": ("config_fed_server.conf", f'components = [{{path = "{HANDLER}", args {{model_id = "{MODEL_ID}"}}}}]'),
    "YAML": ("config_fed_server.yml", f"components:\n- path: {HANDLER}\n  args:\n    model_id: {MODEL_ID}\n"),
    "another's variable": ("config_fed_server.json", with_argument("{$MODEL}")),
    "broken": ("config_fed_server.json", with_argument(MODEL_ID)[:-1]),
    "nested too deeply": ("config_fed_server.json", "[" * 200_000),
    "too large": ("config_fed_server.json", with_argument(MODEL_ID) + " " * MAX_BYTES),
    "odd": ("config_fed_server.json", '{"components": [7]}'),
}


@pytest.mark.parametrize("case", NOT_FOR_THE_PARENT)
def test_what_only_the_job_itself_can_tell_is_not_guessed(run: Run, case: str) -> None:
    name, text = NOT_FOR_THE_PARENT[case]
    configured(run, text, name)
    assert model_id_of_job(run.dir) is None


def test_other_forms_that_do_not_name_the_model_leave_it_to_the_other_sources(run: Run) -> None:
    configured(run, f'components = [{{path = "{HANDLER}"}}]', "config_fed_server.conf")
    assert model_id_of_job(run.dir) == IN_CONFIG


@pytest.mark.parametrize("kind", ["fifo", "folder", "dangling", "loop", "device"])
def test_a_configuration_that_is_no_file_does_not_hold_the_server(run: Run, kind: str) -> None:
    path = configured(run, "")
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to({"dangling": "nowhere", "loop": path.name, "device": "/dev/zero"}[kind])
    assert model_id_of_job(run.dir) is None


def test_the_server_has_no_parser_but_that_of_json() -> None:
    """What a job brings in another form is never parsed in the process that must outlive every job."""
    look = (
        "import sys, flip_observability.nvflare.server_observer;"
        "assert not [name for name in sys.modules if 'nvflare.config_' in name and 'flip' in name]"
    )
    subprocess.run([sys.executable, "-c", look], check=True, timeout=120)
