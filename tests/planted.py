"""A job whose own code quotes patients and secrets wherever it can go wrong.

Researchers' code does: the exceptions of a data loader name the file, and so the patient, that it could not read. This
file is the job's custom code; run as a program, it plays the demo's fatal scenario with it, as ``demo_runs.py`` does.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.signal import Signal
from nvflare.app_common.app_constant import AppConstants

from flip_observability.demo.trainer import Trainer
from flip_observability.nvflare.components import ValidationJsonGenerator

PATIENTS = {
    "client": "Ernestine Musterfrau, accession 7731-0042-C",
    "server": "Eberhard Mustermann, accession 7731-0042-S",
    "panic": "Edeltraud Beispiel, accession 7731-0042-P",
}
"""Who is named: by an exception on a site, by one on the server, and by a component that panics."""


class Unreadable(Trainer):
    """A site that cannot read one of its files in the second round."""

    def execute(self, task_name: str, shareable: Shareable, fl_ctx: FLContext, abort_signal: Signal) -> Shareable:
        current = int(shareable.get_header(AppConstants.CURRENT_ROUND, 0))
        if fl_ctx.get_identity_name() == "site-2" and current == 1:
            raise RuntimeError(f"cannot read the scan of {PATIENTS['client']}")
        return super().execute(task_name, shareable, fl_ctx, abort_signal)


class Panicking(FLComponent):
    """A component of the server that panics when a site has failed."""

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type != EventType.BEFORE_PROCESS_SUBMISSION:
            return
        result = fl_ctx.get_prop(FLContextKey.TASK_RESULT)
        if isinstance(result, Shareable) and result.get_return_code() != ReturnCode.OK:
            self.system_panic(f"no result for {PATIENTS['panic']}", fl_ctx)


class Unwritable(ValidationJsonGenerator):
    """A generator that fails at every event that it is shown, with all that its process knows."""

    def handle_evaluation_events(self, event_type: str, fl_ctx: FLContext) -> None:
        secrets = [os.environ[name] for name in ("INTERNAL_SERVICE_KEY", "AWS_SECRET_ACCESS_KEY")]
        raise RuntimeError(f"cannot write the results of {PATIENTS['server']}", *secrets)


def plant(job: Path) -> None:
    """Make this file the custom code of a job of the demo."""
    config = job / "app" / "config"
    custom = job / "app" / "custom"
    custom.mkdir()
    shutil.copy(__file__, custom / "planted.py")
    _change(config / "config_fed_server.json", {"mishap": "Panicking", "json_generator": "Unwritable"})
    client = json.loads((config / "config_fed_client.json").read_text())
    client["executors"][0]["executor"]["path"] = "planted.Unreadable"
    (config / "config_fed_client.json").write_text(json.dumps(client))


def _change(file: Path, classes: dict[str, str]) -> None:
    server = json.loads(file.read_text())
    for component in server["components"]:
        if component["id"] in classes:
            component["path"] = f"planted.{classes[component['id']]}"
            component["args"].pop("kind", None)
            component["args"].pop("round_number", None)
            component["args"].pop("control_dir", None)
    file.write_text(json.dumps(server))


def allow(workspace: Path) -> None:
    """Let the sites of the simulator load that code."""
    file = workspace / "local" / "resources.json"
    resources: dict[str, Any] = json.loads(file.read_text())
    resources["class_allow_list"].append("planted.")
    file.write_text(json.dumps(resources))


def main(name: str, folder: Path) -> int:
    """Play a scenario with it."""
    import demo_runs
    from flip_observability.demo import runner
    from flip_observability.demo.job import prepare_workspace, write_job

    def planted_job(*arguments: Any, **named: Any) -> Path:
        job = write_job(*arguments, **named)
        plant(job)
        return job

    def planted_workspace(workspace: Path) -> Path:
        prepare_workspace(workspace)
        allow(workspace)
        return workspace

    vars(runner).update(write_job=planted_job, prepare_workspace=planted_workspace)
    return demo_runs.main(name, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
