"""Trace ids in NVFLARE's log, by the configuration that docs/deployment.md shows."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from flip_observability.demo.job import prepare_workspace, write_job
from flip_observability.demo.scenarios import SCENARIOS
from flip_observability.ledger import Ledger
from flip_observability.log_ids import RunIds, put_on_records, take_off_records
from flip_observability.tracing import root_span_id, trace_id_of

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "deployment.md").read_text(encoding="utf-8")
LINE = re.compile(
    r"^[\d-]+ [\d:,]+ - (?P<logger>\S+) - [A-Z]+ - trace=(?P<trace>\w+) span=(?P<span>\w+) - ", re.MULTILINE
)


def configuration() -> str:
    (found,) = re.findall(r"^```json\n(\{\n  \"version\": 1.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return str(found)


def test_the_filter_gives_ids_to_records_that_have_none() -> None:
    bare = logging.LogRecord("x", logging.INFO, "", 0, "text", None, None)
    assert RunIds().filter(bare)
    assert (vars(bare)["otelTraceID"], vars(bare)["otelSpanID"], vars(bare)["otelTraceSampled"]) == ("0", "0", False)
    assert vars(bare)["otelServiceName"] == "flip-fl-server"


def test_the_filter_leaves_ids_alone() -> None:
    def ids() -> tuple[str, str]:
        return "a" * 32, "b" * 16

    put_on_records(ids)
    try:
        record = logging.getLogRecordFactory()("x", logging.INFO, "", 0, "text", (), None)
    finally:
        take_off_records(ids)
    assert RunIds().filter(record)
    assert (vars(record)["otelTraceID"], vars(record)["otelTraceSampled"]) == ("a" * 32, True)


@pytest.mark.nvflare_job
def test_a_real_runs_log_has_its_ids(tmp_path: Path) -> None:
    model = str(uuid.uuid4())
    job = write_job(tmp_path / "job", model, SCENARIOS["success"])
    workspace = prepare_workspace(tmp_path / "workspace")
    (workspace / "local" / "log_config.json").write_text(configuration())
    environment = {**os.environ, "LOCAL_DEV": "true", "FLIP_OBSERVABILITY_DIR": str(tmp_path / "ledger")}
    done = subprocess.run(
        [sys.executable, "-m", "flip_observability.demo.job", str(job), str(workspace)],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Logging error" not in done.stdout
    with Ledger(tmp_path / "ledger", read_only=True) as ledger:
        (run,) = ledger.runs()
    trace, root = f"{trace_id_of(run['run_id']):032x}", f"{root_span_id(run['run_id']):016x}"
    log = (workspace / "server" / "log.txt").read_text(encoding="utf-8")
    lines = [match.groupdict() for match in LINE.finditer(log)]
    assert len(lines) > 50
    # From the first event on, everything carries the run's trace: NVFLARE's own loggers, too.
    assert {line["trace"] for line in lines} == {"0", trace}
    spans = {line["span"] for line in lines if line["trace"] == trace}
    assert root in spans
    assert len(spans) > 3
    assert "ServerRunner" in {line["logger"] for line in lines if line["trace"] == trace}
    records = [json.loads(line) for line in (workspace / "server" / "log.json").read_text().splitlines()]
    assert {record["otelTraceID"] for record in records} == {"0", trace}
