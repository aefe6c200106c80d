"""FLIP's public signatures, recorded from flip-utils 0.13.1, and ours beside them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from flip_observability import FLIP, constants
from flip_observability.nvflare import components
from flip_observability.utils import Utils

NEEDED = inspect.Parameter.empty

SIGNATURES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "FLIP.update_status": (FLIP.update_status, {"model_id": NEEDED, "new_model_status": NEEDED}),
    "FLIP.send_metrics": (
        FLIP.send_metrics,
        dict.fromkeys(("client_name", "model_id", "label", "value", "global_round"), NEEDED)
        | {"x_value": None, "x_label": None},
    ),
    "FLIP.send_handled_exception": (
        FLIP.send_handled_exception,
        dict.fromkeys(("formatted_exception", "client_name", "model_id"), NEEDED),
    ),
    "FLIP.send_event": (
        FLIP.send_event,
        dict.fromkeys(("model_id", "event_type", "global_round"), NEEDED)
        | {"client_name": None, "details": None, "success": True},
    ),
    "FLIP.upload_results_to_s3": (FLIP.upload_results_to_s3, {"results_folder": NEEDED, "model_id": NEEDED}),
    "FLIP.cleanup": (FLIP.cleanup, {"path": NEEDED}),
    "ServerEventHandler": (
        components.ServerEventHandler.__init__,
        {
            "model_id": "",
            "validation_json_generator_id": "json_generator",
            "persist_and_cleanup_id": "persist_and_cleanup",
            "flip": None,  # FLIP's own is made when its module is imported
        },
    ),
    "PersistToS3AndCleanup": (
        components.PersistToS3AndCleanup.__init__,
        {"model_id": "", "persistor_id": "persistor", "flip": None},
    ),
    "ValidationJsonGenerator": (
        components.ValidationJsonGenerator.__init__,
        {"results_dir": "cross_site_val", "json_file_name": "cross_val_results.json"},
    ),
    "EvaluationJsonGenerator": (
        components.EvaluationJsonGenerator.__init__,
        {
            "results_dir": "evaluation_results",
            "json_file_name": "evaluation_results.json",
            "failures_file_name": "evaluation_failures.json",
        },
    ),
}

CONSTANTS: dict[str, dict[str, str]] = {
    "FlipEvents": {
        "TRAINING_INITIATED": "_training_initiated",
        "RESULTS_UPLOAD_STARTED": "_results_upload_started",
        "RESULTS_UPLOAD_COMPLETED": "_results_upload_completed",
        "SEND_RESULT": "_send_result",
        "LOG_EXCEPTION": "_log_exception",
        "ABORTED": "_aborted",
        "TASK_INITIATED": "_task_initiated",
    },
    "FlipProps": {"ROUND_RETURNED": "_flip_round_returned", "ROUND_EXPECTED": "_flip_round_expected"},
    "FlipTasks": {
        "INIT_TRAINING": "init_training",
        "POST_VALIDATION": "post_validation",
        "CLEANUP": "cleanup",
        "INIT_TASK": "init_task",
        "POST_TASK": "post_task",
    },
    "FlipMetaKey": {
        "STAGE": "stage",
        "EVAL_MODEL_NAME": "flip_eval_model_name",
        "SUPPLEMENTARY_RESULTS": "flip_supplementary_results",
    },
    "JobType": {
        "STANDARD": "standard",
        "EVALUATION": "evaluation",
        "FED_OPT": "fed_opt",
        "DIFFUSION": "diffusion_model",
    },
    "ResourceType": {"DICOM": "DICOM", "NIFTI": "NIFTI", "SEGMENTATION": "SEG", "ALL": "ALL"},
    "PTConstants": {
        "PTServerName": "server",
        "PTModelName": "model.pt",
        "PTFileModelName": "FL_global_model.pt",
        "PTBestFileModelName": "best_FL_global_model.pt",
        "PTLocalModelName": "local_model.pt",
        "EvalTaskName": "evaluation",
    },
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_names_order_and_defaults_are_flips(name: str) -> None:
    ours, flips = SIGNATURES[name]
    parameters = {key: value for key, value in inspect.signature(ours).parameters.items() if key != "self"}
    assert list(parameters) == list(flips)
    assert {key: value.default for key, value in parameters.items()} == flips
    assert {value.kind for value in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_have_flips_values(name: str) -> None:
    ours = getattr(constants, name)
    assert {key: str(getattr(ours, key)) for key in CONSTANTS[name]} == CONSTANTS[name]


def test_utils_can_be_called_as_flips() -> None:
    assert Utils.is_valid_uuid("0f8fad5b-d9cb-469f-a165-70867728950e")
    assert Utils.is_string_empty(" ")
