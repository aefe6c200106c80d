"""What docs/deployment.md shows is taken by the programs that it is for."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from nvflare.app_opt.job_launcher.k8s_launcher import _prepare_pod_manifest_template
from nvflare.app_opt.job_launcher.study_runtime import load_study_runtime_file

import prometheus_tools
from command_line import flip_obs
from flip_observability.ledger import FILE_NAME, Ledger
from flip_observability.nvflare import install
from flip_observability.settings import Settings
from history import Run

REPOSITORY = Path(__file__).resolve().parent.parent
DOCUMENT = REPOSITORY / "docs" / "deployment.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^( *)```(\w+)\n(.*?)^ *```$", TEXT, re.MULTILINE | re.DOTALL)


def block(beginning: str) -> str:
    """The one block whose text begins like this."""
    found = [body for _, _, body in BLOCKS if body.startswith(beginning)]
    assert len(found) == 1, beginning
    return str(found[0])


@pytest.mark.system
def test_prometheus_takes_the_configuration(tmp_path: Path) -> None:
    prometheus_tools.require("promtool")
    (tmp_path / "prometheus.yml").write_text(block("# prometheus.yml"))
    shutil.copy(REPOSITORY / "dashboards" / "prometheus" / "flip-alerts.yml", tmp_path)
    for name in re.findall(r"_file: (\S+)", block("# prometheus.yml")):
        (tmp_path / name).touch()
    done = prometheus_tools.run_tool("promtool", "check", "config", "prometheus.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = [job["job_name"] for job in yaml.safe_load(block("# prometheus.yml"))["scrape_configs"]]
    assert jobs == ["flip-observability"]


@pytest.mark.parametrize(("launcher", "name"), [("docker", "Docker"), ("k8s", "Kubernetes")])
def test_nvflare_takes_the_study_runtime(tmp_path: Path, launcher: str, name: str) -> None:
    file = tmp_path / "study_runtime.yaml"
    file.write_text(block(f"# local/study_runtime.yaml, for NVFLARE's {name} launcher"))
    study = load_study_runtime_file(str(file), launcher)["default"]
    ledger = study.datasets[0]
    assert (ledger.mount_path, ledger.read_only) == ("/data/default/ledger", False)
    assert study.env["FLIP_OBSERVABILITY_DIR"] == ledger.mount_path
    if launcher == "k8s":
        pod = _prepare_pod_manifest_template(study.pod_template)
        assert "podAffinity" in pod["spec"]["affinity"]
    known = {field.alias for field in Settings.model_fields.values()}
    assert study.env.keys() | {reference.name for reference in study.secret_env} <= known


def test_the_observer_takes_the_arguments() -> None:
    component = json.loads(block('{"id": "flip_server_observer"'))
    assert (component["id"], component["path"]) == (install.COMPONENT["id"], install.COMPONENT["path"])
    module, name = component["path"].rsplit(".", 1)
    known = inspect.signature(getattr(importlib.import_module(module), name)).parameters
    sentence = re.search(r"as options \((.*?)\)", TEXT, re.DOTALL)
    assert sentence is not None
    assert set(re.findall(r"`\"?(\w+)\W", sentence[1])) == known.keys() >= component["args"].keys()


def test_the_compose_file_mounts_what_it_names() -> None:
    compose = yaml.safe_load(block("services:"))
    server = compose["services"]["fl-server"]
    assert server["environment"]["FLIP_OBSERVABILITY_DIR"] == "/ledger"
    assert {"ledger:/ledger", "./server:/workspace"} == set(server["volumes"])
    assert list(compose["volumes"]) == ["ledger"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    unit = block("# /etc/systemd/system/flip-obs.service")
    command = Path(sys.executable).with_name("flip-obs")
    assert "/opt/flip/bin/flip-obs" in unit
    file = tmp_path / "flip-obs.service"
    file.write_text(unit.replace("/opt/flip/bin/flip-obs", str(command)).replace("User=flip\n", "User=root\n"))
    done = subprocess.run(["systemd-analyze", "verify", str(file)], capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "flip-obs" in line]
    assert not said


def test_the_commands_exist() -> None:
    commands = set(re.findall(r"flip-obs (?:--\S+ \S+ )?([a-z]+)", TEXT))
    assert commands >= {"install", "adopt", "serve", "runs", "outbox"}
    for command in commands:
        assert flip_obs(command, "--help").returncode == 0, command


def test_a_backup_of_a_ledger_in_use_is_whole(tmp_path: Path) -> None:
    folder, copies = tmp_path / "ledger", tmp_path / "copies"
    copies.mkdir()
    stop = threading.Event()

    def write() -> None:
        with Ledger(folder) as ledger:
            while not stop.is_set():
                Run(ledger).train({"site-1": 2})

    with Ledger(folder) as ledger:
        run = Run(ledger)
        run.train({"site-1": 2})
        run.finish("RESULTS_UPLOADED")
    writer = threading.Thread(target=write)
    writer.start()
    try:
        environment = {**os.environ, "FLIP_OBSERVABILITY_DIR": str(folder)}
        script = block("umask 077").replace("python3 ", f"{sys.executable} ")
        subprocess.run(["bash", "-ec", script], cwd=copies, env=environment, check=True, timeout=60)
    finally:
        stop.set()
        writer.join(60)
    copy = next(copies.iterdir())
    assert copy.stat().st_mode & 0o777 == 0o600
    (tmp_path / "restored").mkdir(mode=0o700)
    copy.rename(tmp_path / "restored" / FILE_NAME)
    with sqlite3.connect(tmp_path / "restored" / FILE_NAME) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    shown = flip_obs("--dir", tmp_path / "restored", "runs", "--status", "RESULTS_UPLOADED")
    assert shown.returncode == 0
    assert "RESULTS_UPLOADED" in shown.stdout
    with Ledger(tmp_path / "restored") as ledger:  # and can be written
        Run(ledger).train({"site-1": 1})


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_links_lead_somewhere() -> None:
    headings = {anchor(heading) for heading in re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)}
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, fragment = target.partition("#")
        assert not path or (DOCUMENT.parent / path).exists(), target
        if not path:
            assert fragment in headings, target
