"""The vocabulary: statuses and events of FLIP, events of NVFLARE. No logic, and no import of NVFLARE.

NVFLARE's event names are spelled out here so that the lifecycle needs no NVFLARE to be tested or read by the
command line; a test compares them with the installed NVFLARE.
"""

from __future__ import annotations

from enum import Enum


class _Text(str, Enum):
    """A string that is also an enumeration member (``enum.StrEnum`` exists from Python 3.11 only)."""

    def __str__(self) -> str:
        return str(self.value)


class ModelStatus(_Text):
    """What the Central Hub can be told about a model (hub-side vocabulary of both wire contracts)."""

    PENDING = "PENDING"
    INITIATED = "INITIATED"
    PREPARED = "PREPARED"
    TRAINING_STARTED = "TRAINING_STARTED"
    RESULTS_UPLOADED = "RESULTS_UPLOADED"
    ERROR = "ERROR"
    STOPPED = "STOPPED"
    RUNNING = "RUNNING"
    RESULTS_UPLOAD_FAILED = "RESULTS_UPLOAD_FAILED"


FINAL_STATUSES = frozenset(
    {ModelStatus.RESULTS_UPLOADED, ModelStatus.ERROR, ModelStatus.STOPPED, ModelStatus.RESULTS_UPLOAD_FAILED}
)
"""Statuses after which the hub frees the FL network for the next job."""


class FlipEvents(_Text):
    """Events that FLIP's controllers, persist component and clients fire."""

    TRAINING_INITIATED = "_training_initiated"
    TASK_INITIATED = "_task_initiated"
    RESULTS_UPLOAD_STARTED = "_results_upload_started"
    RESULTS_UPLOAD_COMPLETED = "_results_upload_completed"
    SEND_RESULT = "_send_result"
    LOG_EXCEPTION = "_log_exception"
    ABORTED = "_aborted"


class FlareEvents(_Text):
    """The events of NVFLARE's ``EventType`` and ``AppEventType`` that a run's lifecycle is made of."""

    START_RUN = "_start_run"
    ABOUT_TO_END_RUN = "_about_to_end_run"
    END_RUN = "_end_run"
    START_WORKFLOW = "_start_workflow"
    END_WORKFLOW = "_end_workflow"
    FATAL_SYSTEM_ERROR = "_fatal_system_error"
    CLIENT_DISCONNECTED = "_client_disconnected"
    CLIENT_RECONNECTED = "_client_reconnected"
    AFTER_TASK_DATA_FILTER = "_after_task_data_filter"
    BEFORE_PROCESS_SUBMISSION = "_before_process_submission"
    INITIAL_MODEL_LOADED = "_initial_model_loaded"
    TRAINING_STARTED = "_training_started"
    TRAINING_FINISHED = "_training_finished"
    ROUND_STARTED = "_round_started"
    ROUND_DONE = "_round_done"
    AFTER_CONTRIBUTION_ACCEPT = "_after_contribution_accept"
    BEFORE_AGGREGATION = "_before_aggregation"
    AFTER_AGGREGATION = "_after_aggregation"
    BEFORE_LEARNABLE_PERSIST = "_before_save_model"
    AFTER_LEARNABLE_PERSIST = "_after_save_model"
    GLOBAL_BEST_MODEL_AVAILABLE = "_global_best_model_available"
    VALIDATION_RESULT_RECEIVED = "_validation_result_received"


class OwnEvents(_Text):
    """What this package itself puts into a run's history beside the events of NVFLARE and FLIP."""

    UPLOAD_FAILED = "flip.upload_failed"
    STATUS = "flip.status"
    ORPHANED = "flip.orphaned"
    FINAL_STATUS = "flip.final_status"
    HUB_REQUEST = "flip.hub_request"
    OBSERVABILITY_ERRORS = "flip.observability_errors"


class FlipMetaKey(_Text):
    """Keys of a shareable's or context's FLIP metadata."""

    STAGE = "stage"
    EVAL_MODEL_NAME = "flip_eval_model_name"
    SUPPLEMENTARY_RESULTS = "flip_supplementary_results"


class FlipTasks(_Text):
    """Names of the tasks that FLIP's controllers give to clients beside training and validation."""

    INIT_TRAINING = "init_training"
    POST_VALIDATION = "post_validation"
    CLEANUP = "cleanup"
    INIT_TASK = "init_task"
    POST_TASK = "post_task"


class FlipProps(_Text):
    """Properties of a context in which FLIP's controllers leave a round's counts."""

    ROUND_RETURNED = "_flip_round_returned"
    ROUND_EXPECTED = "_flip_round_expected"


class FLLogEvent(_Text):
    """Events that a hub of the contract 2026-10 takes in a model's log."""

    ROUND_STARTED = "ROUND_STARTED"
    CLIENT_RESULT_RECEIVED = "CLIENT_RESULT_RECEIVED"
    ROUND_AGGREGATED = "ROUND_AGGREGATED"
    JOB_WAITING_FOR_RESOURCES = "JOB_WAITING_FOR_RESOURCES"


ROUND_LESS_EVENTS = frozenset({FLLogEvent.JOB_WAITING_FOR_RESOURCES.value})
"""Events of a job that has not begun, and so belongs to no round."""


class JobType(_Text):
    """Kinds of FLIP's jobs."""

    STANDARD = "standard"
    EVALUATION = "evaluation"
    FED_OPT = "fed_opt"
    DIFFUSION = "diffusion_model"


class ResourceType(_Text):
    """Kinds of imaging data, which only the hospitals' side can give."""

    DICOM = "DICOM"
    NIFTI = "NIFTI"
    SEGMENTATION = "SEG"
    ALL = "ALL"


class PTConstants:
    """Names of the files and folders of FLIP's PyTorch jobs."""

    PTServerName = "server"
    PTModelName = "model.pt"
    PTFileModelName = "FL_global_model.pt"
    PTBestFileModelName = "best_FL_global_model.pt"
    PTLocalModelName = "local_model.pt"
    CrossValResultsJsonFilename = "cross_val_results.json"
    EvalResultsFilename = "evaluation_results.json"
    EvalFailuresFilename = "evaluation_failures.json"
    EvalDir = "evaluation_results"
    EvalTaskName = "evaluation"


class FlipMetricsLabel(_Text):
    """Labels of the metrics that FLIP's trainers send."""

    LOSS_FUNCTION = "LOSS_FUNCTION"
    DL_RESULT = "DL_RESULT"
    AVERAGE_SCORE = "AVERAGE_SCORE"


NO_HUB = "LOCAL_DEV"
"""The outcome of a message to the hub where there is no hub to be told."""
