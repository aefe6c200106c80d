"""The compose file and the Dockerfile say what is so: judged by the specification, and by the files that they name."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dockerfile_parse import DockerfileParser
from filelock import FileLock
from scripts import digests

from flip_observability.demo import hub, server
from flip_observability.settings import Settings
from otel_collector import MANIFEST

ROOT = Path(__file__).parent.parent
COMPOSE = ROOT / "docker-compose.yml"
DOCKERFILE = ROOT / "Dockerfile"
MAKE_ENV = ROOT / "stack" / "make-env.sh"
LOADER = "github.com/compose-spec/compose-go/v2/cmd@v2.16.2"
"""What `docker compose` reads its files with, as a program of its own."""
OURS = "flip-observability/"


def compose() -> dict[str, Any]:
    """The compose file, with images and the folder of targets at their defaults."""
    text = re.sub(r"\$\{(?:\w+_IMAGE|STACK_TARGETS):-([^}]+)\}", r"\1", COMPOSE.read_text())
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


SERVICES: dict[str, dict[str, Any]] = compose()["services"]


def parse_dockerfile(text: str) -> list[dict[str, Any]]:
    """The instructions of a Dockerfile: ``instruction`` and ``value``, without comments, build arguments filled in."""
    parser = DockerfileParser(fileobj=io.BytesIO(text.encode()))  # type: ignore[arg-type]  # it takes bytes, too
    items: list[dict[str, Any]] = [dict(item) for item in parser.structure if item["instruction"] != "COMMENT"]
    defaults = dict(item["value"].split("=", 1) for item in items if item["instruction"] == "ARG")
    for item in items:
        if item["instruction"] == "FROM":
            item["value"] = re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], item["value"])
    return [item for item in items if item["instruction"] != "ARG"]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Each stage's instructions, those of the stages that it stands on before its own."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for item in parse_dockerfile(DOCKERFILE.read_text()):
        instruction, value = item["instruction"], item["value"]
        if instruction == "FROM":
            base, _, name = value.split()
            found[name] = list(found.get(base, [("FROM", base)]))
        else:
            found[name].append((instruction, value))
    return found


def dockerfile_images() -> set[str]:
    names = set(stages())
    return {
        value.split()[0]
        for item in parse_dockerfile(DOCKERFILE.read_text())
        if item["instruction"] == "FROM" and (value := item["value"]).split()[0] not in names
    }


# -- the compose file --------------------------------------------------------------------------------------------------


def test_it_keeps_to_the_specification(tmp_path: Path) -> None:
    def check(file: Path) -> int:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode

    assert check(COMPOSE) == 0
    broken = tmp_path / "docker-compose.yml"
    broken.write_text(COMPOSE.read_text().replace("read_only: true", "readonly: true"))
    assert check(broken) != 0


def _go() -> str | None:
    return shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")


@pytest.fixture(scope="module")
def loader() -> Path:
    go = _go()
    if go is None:
        pytest.skip("there is no Go to build the compose file's reader with")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flip-observability"
    folder = cache / f"compose-{LOADER.rpartition('@')[2]}"
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "cmd").exists():
            environment = os.environ | {"GOBIN": str(folder), "CGO_ENABLED": "0"}
            built = subprocess.run(
                [go, "install", LOADER], env=environment, capture_output=True, text=True, timeout=500, check=False
            )
            if built.returncode:
                pytest.skip("the compose file's reader cannot be built: no network?")
    return folder / "cmd"


def _read(loader: Path, file: Path) -> subprocess.CompletedProcess[str]:
    """Have a compose file read and judged. This program is given no variables: it knows defaults alone."""
    command = [str(loader), "--format", "json", str(file)]
    environment = {"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/"), "COMPOSE_PROFILES": "demo"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)


def secrets_of(file: Path) -> dict[str, str]:
    lines = [line for line in file.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.mark.system
def test_compose_reads_it_with_the_variables_that_make_stack_writes(loader: Path, tmp_path: Path) -> None:
    subprocess.run([str(MAKE_ENV), str(tmp_path / ".env")], capture_output=True, timeout=60, check=True)
    secrets = secrets_of(tmp_path / ".env")
    filled = tmp_path / "docker-compose.yml"
    filled.write_text(re.sub(r"\$\{(\w+):\?[^}]+\}", lambda found: secrets[found[1]], COMPOSE.read_text()))
    told = _read(loader, filled)
    assert told.returncode == 0, told.stderr
    services = json.loads(told.stdout)["services"]
    assert set(services) == set(SERVICES)
    environment = services["exporter"]["environment"]
    assert environment["INTERNAL_SERVICE_KEY"] == secrets["STACK_HUB_KEY"]
    (targets,) = (v for v in services["prometheus"]["volumes"] if v["target"] == "/etc/prometheus/targets")
    assert targets["source"].endswith("/stack/targets")
    Settings.model_validate(environment)


@pytest.mark.system
def test_without_the_secrets_nothing_starts(loader: Path) -> None:
    told = _read(loader, COMPOSE)
    assert told.returncode != 0
    asked = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    assert set(re.findall(r"required variable (\w+) is missing", told.stderr)) == asked
    assert len(asked) == 4


def test_make_env_writes_what_is_asked_for_once_and_for_its_owner_only(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for file in (one, other, one):
        before = file.read_text() if file.exists() else None
        subprocess.run([str(MAKE_ENV), str(file)], capture_output=True, timeout=60, check=True)
        assert before in (None, file.read_text())
        assert file.stat().st_mode & 0o777 == 0o600
    asked = set(re.findall(r"\$\{(\w+):\?", COMPOSE.read_text()))
    assert set(secrets_of(one)) == asked
    assert all(len(value) >= 20 for value in secrets_of(one).values())
    assert not set(secrets_of(one).values()) & set(secrets_of(other).values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_no_secret_has_a_default() -> None:
    for line in COMPOSE.read_text().splitlines():
        name, _, value = line.strip().partition(": ")
        if re.search(r"PASSWORD|SECRET|_KEY$|ACCESS_KEY|SERVICE_KEY", name) and not name.startswith("#"):
            assert re.fullmatch(r"\$\{\w+:\?[^}]+\}", value), line


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_every_service_is_hardened_pinned_checked_and_on_loopback(name: str) -> None:
    service = SERVICES[name]
    assert re.fullmatch(r"[a-z0-9/-]+:v?\d+\.\d+\.\d+", service["image"])
    assert service["restart"] == "unless-stopped"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["logging"]["options"]["max-size"]
    assert service["healthcheck"]["test"][0] == "CMD"
    assert "privileged" not in service
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert ("build" in service) == service["image"].startswith(OURS)


def test_every_file_that_is_mounted_is_in_the_repository_and_read_only() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    files = set(tracked.stdout.split())
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            source, target, *mode = volume.split(":")
            if source.startswith("."):
                assert (ROOT / source).exists(), f"{name}: {source}"
                assert mode == ["ro"], f"{name}: {source}"
                path = source.removeprefix("./")
                assert not files or any(file == path or file.startswith(f"{path}/") for file in files), source
            else:
                assert source in compose()["volumes"], f"{name}: {source}"
            assert target.startswith("/")
    used = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert set(compose()["volumes"]) <= used


def test_what_a_container_is_told_to_read_is_mounted_there() -> None:
    for name in ("prometheus", "alertmanager", "tempo"):
        (file,) = re.findall(r"-?-config\.file=(\S+)", " ".join(SERVICES[name]["command"]))
        assert file in {volume.split(":")[1] for volume in SERVICES[name]["volumes"]}
    prometheus = yaml.safe_load((ROOT / "dashboards/prometheus/prometheus.yml").read_text())
    mounted = {volume.split(":")[1] for volume in SERVICES["prometheus"]["volumes"]}
    assert {f"/etc/prometheus/{file}" for file in prometheus["rule_files"]} <= mounted
    read = re.findall(r"\[(targets/[\w.]+)\]", (ROOT / "dashboards/prometheus/prometheus.yml").read_text())
    assert {f"targets/{file.name}" for file in (ROOT / "stack/targets").iterdir()} == set(read)
    dashboards = yaml.safe_load((ROOT / "dashboards/provisioning/dashboards/flip.yaml").read_text())
    grafana = {volume.split(":")[1]: volume.split(":")[0] for volume in SERVICES["grafana"]["volumes"]}
    folder = dashboards["providers"][0]["options"]["path"]
    assert folder in grafana
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (ROOT / grafana[folder] / Path(home).relative_to(folder)).is_file()


def test_whoever_is_spoken_to_is_a_service_that_listens_there() -> None:
    listens = {
        "collector": {4317, 4318, 8888},
        "prometheus": {9090},
        "alertmanager": {9093},
        "tempo": {3200, 4317},
        "exporter": {9464},
        "hub": {8000},
        "s3": {7070},
    }
    tempo = yaml.safe_load((ROOT / "stack/tempo.yaml").read_text())
    assert tempo["server"]["http_listen_port"] == 3200
    assert tempo["distributor"]["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] == "0.0.0.0:4317"
    texts = [
        *(str(value) for service in SERVICES.values() for value in service.get("environment", {}).values()),
        *(file.read_text() for file in (ROOT / "stack/targets").iterdir()),
        (ROOT / "dashboards/provisioning/datasources/flip.yaml").read_text(),
    ]
    named = {(host, int(port)) for text in texts for host, port in re.findall(r"\b([a-z][a-z0-9-]+):(\d{4})\b", text)}
    assert {
        ("tempo", 4317),
        ("hub", 8000),
        ("s3", 7070),
        ("exporter", 9464),
        ("alertmanager", 9093),
        ("collector", 8888),
    } <= named
    for host, port in named:
        assert port in listens[host], f"{host}:{port}"
    for name, service in SERVICES.items():
        assert set(service.get("depends_on", {})) <= set(SERVICES)
        for outer, inner in (port.split(":")[1:] for port in service.get("ports", [])):
            assert outer == inner
            assert int(inner) in listens.get(name, {3000})


def test_health_is_asked_where_the_service_answers() -> None:
    asked = {
        name: re.search(r"http://127\.0\.0\.1:(\d+)", " ".join(service["healthcheck"]["test"]))
        for name, service in SERVICES.items()
    }
    ports = {name: int(found[1]) for name, found in asked.items() if found}
    assert ports == {
        "collector": 13133,
        "prometheus": 9090,
        "alertmanager": 9093,
        "tempo": 3200,
        "grafana": 3000,
        "exporter": 9464,
        "hub": 8000,
        "s3": 7070,
    }
    assert f"/data/demo/{server.ALIVE}" in " ".join(SERVICES["fl-server"]["healthcheck"]["test"])
    assert hub.HEALTH_PATH in " ".join(SERVICES["hub"]["healthcheck"]["test"])


def test_the_environment_is_one_that_its_readers_know() -> None:
    known = {field.alias for field in Settings.model_fields.values()}
    ours = SERVICES["exporter"]["environment"]
    assert ours == SERVICES["fl-server"]["environment"]
    foreign = {name for name in ours if not name.startswith(("AWS_", "OTEL_"))} - known
    assert not foreign
    collector = set(re.findall(r"\$\{env:(\w+)", (ROOT / "otel-collector.yaml").read_text()))
    assert {name for name in SERVICES["collector"]["environment"] if name.startswith("FLIP_")} <= collector


def test_the_demo_server_understands_its_command() -> None:
    command = SERVICES["fl-server"]["command"]
    assert command[:3] == ["python", "-m", server.__name__]
    filled = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in command[3:]]
    arguments = server._arguments(filled)
    assert set(arguments.scenarios) == {"success", "fatal", "abort"}
    assert arguments.every > 0
    data = dict(reversed(volume.split(":")) for volume in SERVICES["fl-server"]["volumes"])
    assert any(arguments.folder.is_relative_to(path) for path in data), "what it writes lies on a volume"


@pytest.mark.system
def test_prometheus_accepts_the_configuration_as_it_is_mounted(tmp_path: Path) -> None:
    from prometheus_tools import run_tool

    for volume in SERVICES["prometheus"]["volumes"]:
        source, target = volume.split(":")[:2]
        if target.startswith("/etc/prometheus"):
            place = tmp_path / Path(target).relative_to("/etc/prometheus")
            (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, place)
    told = run_tool("promtool", "check", "config", tmp_path / "prometheus.yml")
    assert told.returncode == 0, told.stderr


# -- the Dockerfile ----------------------------------------------------------------------------------------------------


def test_every_target_of_the_compose_file_is_a_stage_and_has_its_image_name() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for service in SERVICES.values():
        if "build" in service:
            assert service["build"]["target"] in stages()
            assert service["image"] == f"{OURS}{service['build']['target']}:{version}"


def test_every_image_is_named_in_one_place_and_can_be_another() -> None:
    pulled = {service["image"] for service in SERVICES.values() if "build" not in service}
    for file, images in ((DOCKERFILE, dockerfile_images()), (COMPOSE, pulled)):
        text = file.read_text()
        assert {found["image"] for found in digests.NAMED.finditer(text)} == images
        assert all(text.count(image) == 1 for image in images)


def test_base_images_are_pinned() -> None:
    assert {image.partition(":")[0] for image in dockerfile_images()} == {"python", "golang", "busybox"}
    assert all(re.fullmatch(r"[a-z]+:\d+\.\d+\.\d+(-[a-z-]+)?", image) for image in dockerfile_images())


@pytest.mark.parametrize("target", ["exporter", "server", "demo", "collector", "s3"])
def test_images_do_not_run_as_root_and_tell_their_health(target: str) -> None:
    instructions = stages()[target]
    users = [value for instruction, value in instructions if instruction == "USER"]
    assert users
    assert users[-1] == "10001:10001"
    last_user = max(i for i, (instruction, _) in enumerate(instructions) if instruction == "USER")
    assert not any(instruction == "RUN" for instruction, _ in instructions[last_user:])
    health = [value for instruction, value in instructions if instruction == "HEALTHCHECK"]
    assert len(health) == 1
    assert json.loads(health[0].partition("CMD")[2])
    assert any(instruction == "CMD" for instruction, _ in instructions)


@pytest.mark.parametrize("target", ["exporter", "demo", "collector", "s3"])
def test_compose_asks_for_health_as_the_image_does(target: str) -> None:
    (health,) = (json.loads(value.partition("CMD")[2]) for name, value in stages()[target] if name == "HEALTHCHECK")
    service = {"demo": "fl-server"}.get(target, target)
    assert ["CMD", *health] == SERVICES[service]["healthcheck"]["test"]


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    needed = {"README.md", "LICENSE", "pyproject.toml", "src", "requirements/run.txt"}
    copied: set[str] = set()
    for item in parse_dockerfile(DOCKERFILE.read_text()):
        if item["instruction"] != "COPY":
            continue
        words = shlex.split(item["value"])
        origin = [word.removeprefix("--from=") for word in words if word.startswith("--from=")]
        if origin:
            assert origin[0] in stages()
            continue
        for source in words[:-1]:
            copied.add(source)
            assert (ROOT / source).exists(), source
            assert any(source == entry or source.startswith(f"{entry}/") for entry in allowed), source
    assert needed <= copied
    assert all((ROOT / entry).exists() for entry in allowed)


def test_the_health_checks_of_python_images_are_programs() -> None:
    for target in ("exporter", "server", "demo"):
        for instruction, value in stages()[target]:
            if instruction == "HEALTHCHECK":
                program, flag, code = json.loads(value.partition("CMD")[2])
                assert (program, flag) == ("python", "-c")
                compile(code, target, "exec")


def test_the_collector_is_built_from_the_manifest() -> None:
    text = DOCKERFILE.read_text()
    assert "COPY collector/manifest.yaml" in text
    manifest = yaml.safe_load(MANIFEST.read_text())
    name, output = manifest["dist"]["name"], manifest["dist"]["output_path"]
    assert f"/build/{output.removeprefix('./')}/{name}" in text
    program = """$1 == "version:" { print $2; exit }"""
    assert program in text
    found = subprocess.run(["awk", program, str(MANIFEST)], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.strip() == manifest["dist"]["version"]
