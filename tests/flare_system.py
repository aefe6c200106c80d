"""A real NVFLARE system on this machine: kits of ``nvflare poc prepare``, a server, clients, an administrator."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

import server_kit
from waiting import free_port

ADMIN = "admin@nvidia.com"
_MODULES = {
    "server": ("nvflare.private.fed.app.server.server_train", "fed_server.json"),
    "client": ("nvflare.private.fed.app.client.client_train", "fed_client.json"),
}


class FlareSystem:
    """One server and its clients, on a free port, below ``home``; every process ends with :meth:`stop`."""

    python = sys.executable
    """Of the processes: the one of the tests, unless another one has what the jobs need."""

    def __init__(self, home: Path, clients: int = 1) -> None:
        self.kits = server_kit.poc_kits(home, clients)
        self.server_kit = self.kits / "server"
        self.clients = [f"site-{number + 1}" for number in range(clients)]
        self.logs = home / "logs"
        self.logs.mkdir()
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        port = str(free_port())
        for file in self.kits.glob("*/startup/fed_*.json"):
            file.write_text(re.sub(r"\b8002\b", port, file.read_text()))

    def start(self, name: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
        """Start ``server`` or a client, as its kit's script does, with more variables in its environment."""
        kind = "server" if name == "server" else "client"
        module, config = _MODULES[kind]
        options = ["secure_train=true", "org=nvidia", "config_folder=config"] + ([f"uid={name}"] * (kind == "client"))
        command = [self.python, "-u", "-m", module, "-m", str(self.kits / name), "-s", config, "--set", *options]
        with (self.logs / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command,
                cwd=self.kits / name,
                env={**os.environ, **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        return self.processes[name]

    def log(self, name: str) -> str:
        """What a process and its children printed."""
        return (self.logs / f"{name}.log").read_text(errors="replace")

    @contextlib.contextmanager
    def session(self, seconds: float = 60.0) -> Iterator[Session]:
        """An administrator's session, when server and clients are there."""
        end = time.monotonic() + seconds
        while (session := self._connect()) is None:
            assert time.monotonic() < end, self.log("server")[-4_000:]
            time.sleep(0.5)
        try:
            while len(session.get_system_info().client_info) < len(self.clients):
                assert time.monotonic() < end, self.log(self.clients[0])[-4_000:]
                time.sleep(0.3)
            yield session
        finally:
            session.close()

    def _connect(self) -> Session | None:
        try:
            return new_secure_session(ADMIN, str(self.kits / ADMIN), timeout=5.0)
        except Exception:
            return None

    def stop(self) -> None:
        """End every process that was started, and their children, by pid."""
        victims: list[psutil.Process] = []
        for process in self.processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                parent = psutil.Process(process.pid)
                victims += [*parent.children(recursive=True), parent]
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
        psutil.wait_procs(victims, timeout=10)
        for process in self.processes.values():
            process.wait(10)

    def __enter__(self) -> FlareSystem:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def component(name: str, path: str, **args: Any) -> dict[str, Any]:
    return {"id": name, "path": path, "args": args}


def write_flip_job(folder: Path, model_id: str, rounds: int = 2, package: str = "flip.nvflare.components") -> Path:
    """A job as FLIP has them, of NVFLARE's own parts and without custom code."""
    common = "nvflare.app_common"
    server = {
        "format_version": 2,
        "components": [
            component("persistor", f"{common}.np.np_model_persistor.NPModelPersistor"),
            component(
                "shareable_generator",
                f"{common}.shareablegenerators.full_model_shareable_generator.FullModelShareableGenerator",
            ),
            component(
                "aggregator",
                f"{common}.aggregators.intime_accumulate_model_aggregator.InTimeAccumulateWeightedAggregator",
                expected_data_kind="WEIGHTS",
            ),
            component("json_generator", f"{package}.ValidationJsonGenerator"),
            component("flip_server_event_handler", f"{package}.ServerEventHandler", model_id=model_id),
            component("persist_and_cleanup", f"{package}.PersistToS3AndCleanup", model_id=model_id),
        ],
        "workflows": [
            component(
                "scatter_and_gather",
                f"{common}.workflows.scatter_and_gather.ScatterAndGather",
                min_clients=1,
                num_rounds=rounds,
                wait_time_after_min_received=0,
                aggregator_id="aggregator",
                persistor_id="persistor",
                shareable_generator_id="shareable_generator",
            )
        ],
    }
    trainer = {"path": f"{common}.np.np_trainer.NPTrainer", "args": {"sleep_time": 0}}
    client = {"format_version": 2, "executors": [{"tasks": ["train"], "executor": trainer}], "components": []}
    meta = {"name": folder.name, "deploy_map": {"app": ["@ALL"]}, "min_clients": 1, "resource_spec": {}}
    config = folder / "app" / "config"
    config.mkdir(parents=True)
    for file, content in (
        (folder / "meta.json", meta),
        (config / "config_fed_server.json", server),
        (config / "config_fed_client.json", client),
    ):
        file.write_text(json.dumps(content, indent=2))
    return folder
