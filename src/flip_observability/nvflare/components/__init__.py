"""The components of a job's server configuration, under the names of FLIP's own."""

from __future__ import annotations

from flip_observability.nvflare.components.evaluation_json_generator import EvaluationJsonGenerator
from flip_observability.nvflare.components.persist_to_s3_and_cleanup import PersistToS3AndCleanup
from flip_observability.nvflare.components.server_event_handler import ServerEventHandler
from flip_observability.nvflare.components.validation_json_generator import ValidationJsonGenerator

__all__ = ["EvaluationJsonGenerator", "PersistToS3AndCleanup", "ServerEventHandler", "ValidationJsonGenerator"]
