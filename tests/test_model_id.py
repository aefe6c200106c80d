"""Where the model id of a run comes from, whatever a job may have written there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.fl_context import FLContext, FLContextManager

from flare_run import JOB_ID, MODEL_ID, Run
from flip_observability.nvflare.model_id import MAX_BYTES, model_id_of_run, resolve_model_id

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
