"""``make fresh``: what goes into the container, what does not, and how its commands end.

The containers themselves need an engine and an image, so they are no part of these tests: ``make fresh`` runs them.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from scripts import base_image, containers, fresh

from certificates import Authority

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's home, with certificates and a folder of wheels."""
    (tmp_path / "wheels").mkdir()
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n", encoding="utf-8")
    (tmp_path / "key.pem").write_text("-----BEGIN PRIVATE KEY-----\n", encoding="utf-8")
    return tmp_path


def passed(home: Path, **environment: str) -> containers.PassedOn:
    return containers.passed_on({"HOME": str(home), **environment})


def user_files(found: containers.PassedOn) -> list[tuple[Path, str]]:
    """pip's files without the machine's own, which a test cannot choose."""
    return [(file, place) for file, place in found.pip_files if not place.startswith("/")]


@pytest.mark.parametrize(
    "name", ["PIP_INDEX_URL", "PIP_NO_INDEX", "HTTP_PROXY", "https_proxy", "no_proxy", "ALL_PROXY", "PIP_TRUSTED_HOST"]
)
def test_settings_of_pip_and_proxies_go_in(home: Path, name: str) -> None:
    assert passed(home, **{name: "anything"}).variables == (name,)


@pytest.mark.parametrize(
    "name", ["SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO"]
)
def test_certificates_go_in_with_their_file(home: Path, name: str) -> None:
    found = passed(home, **{name: f"{home}/ca.pem"})
    assert found.variables == (name,)
    assert f"{home}/ca.pem" in found.paths


@pytest.mark.parametrize(
    "name",
    [
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_CA_BUNDLE",
        "INTERNAL_SERVICE_KEY",
        "PIP_TOKEN",
        "CERT_PASSWORD",
        "PATH",
        "PYTHONPATH",
        "LANG",
        "VIRTUAL_ENV",
    ],
)
def test_nothing_else_of_the_environment_goes_in(home: Path, name: str) -> None:
    found = passed(home, **{name: f"{home}/ca.pem"})
    assert found.variables == ()
    assert f"{home}/ca.pem" not in found.paths


@pytest.mark.parametrize("value", ["key.pem", "missing.pem"])
def test_a_private_key_or_a_text_is_no_certificate(home: Path, value: str) -> None:
    assert passed(home, MY_CERT=f"{home}/{value}").variables == ()
    assert passed(home, MY_CERT="-----BEGIN CERTIFICATE-----").variables == ()


def test_the_folders_that_a_setting_names_are_mounted_where_they_are(home: Path) -> None:
    found = passed(
        home, PIP_FIND_LINKS=f"{home}/wheels https://example.org/wheels file://{home}/ca.pem /no/such/folder"
    )
    assert {f"{home}/wheels", f"{home}/ca.pem"} <= set(found.paths)
    assert not any("example" in path or "no/such" in path for path in found.paths)
    assert f"--mount=type=bind,source={home}/wheels,target={home}/wheels,readonly" in found.options()


def test_the_engine_is_told_names_and_no_values(home: Path) -> None:
    options = passed(home, PIP_INDEX_URL="https://user:hush@example.org/simple").options()
    assert "--env=PIP_INDEX_URL" in options
    assert "hush" not in " ".join(options)


@pytest.mark.parametrize("place", [".pip/pip.conf", ".config/pip/pip.conf"])
def test_pips_own_files_go_in_with_what_they_name(home: Path, place: str) -> None:
    file = home / place
    file.parent.mkdir(parents=True)
    file.write_text(f"[global]\ncert = {home}/ca.pem\n[install]\nfind-links =\n    {home}/wheels\n    https://x.org\n")
    found = passed(home)
    assert user_files(found) == [(file, place)]
    assert {f"{home}/wheels", f"{home}/ca.pem"} <= set(found.paths)


def test_the_file_that_pip_is_told_to_read_takes_the_users_place(home: Path) -> None:
    (home / "other.conf").write_text("[global]\ntimeout = 9\n", encoding="utf-8")
    found = passed(home, PIP_CONFIG_FILE=f"{home}/other.conf")
    assert user_files(found) == [(home / "other.conf", ".config/pip/pip.conf")]
    assert found.variables == ()
    assert passed(home, PIP_CONFIG_FILE=os.devnull).pip_files == ()


def test_nothing_is_mounted_over_the_images_certificates(home: Path) -> None:
    store = str(containers.TRUST_STORE)
    found = passed(home, SSL_CERT_DIR=store, PIP_CERT=f"{store}/ca-certificates.crt")
    assert not any(path.startswith(store) for path in found.paths)


@pytest.mark.parametrize(
    ("proxy", "expected"),
    [
        ("http://127.0.0.1:3128", [containers.HOST_NETWORK]),
        ("http://user:hush@localhost:3128", [containers.HOST_NETWORK]),
        ("http://[::1]:3128", [containers.HOST_NETWORK]),
        ("http://proxy.example.org:3128", [(), containers.HOST_NETWORK]),
        ("", [(), containers.HOST_NETWORK]),
    ],
)
def test_a_proxy_on_this_machine_is_reached_over_its_own_network(proxy: str, expected: list[tuple[str, ...]]) -> None:
    assert containers.networks({"https_proxy": proxy, "NO_PROXY": "localhost"}) == expected


def test_every_certificate_of_the_machines_bundle_is_found(tmp_path: Path) -> None:
    one, two = (Authority(tmp_path, name).certificate.read_text(encoding="utf-8") for name in ("one", "two"))
    (tmp_path / "bundle.pem").write_text(f"# One\n{one}\n# Two\n{two}", encoding="utf-8")
    assert containers.certificates({"SSL_CERT_FILE": f"{tmp_path}/bundle.pem"}) == [one, two]


def test_another_content_or_month_is_another_image() -> None:
    days = datetime.date(2026, 1, 31), datetime.date(2026, 2, 1), datetime.date(2026, 2, 28)
    names = {
        base_image.image_name(suite, trusted, day)
        for suite in base_image.SUITES
        for trusted in ([], ["one"])
        for day in days
    }
    assert len(names) == 8
    assert all(re.fullmatch(r"localhost/[a-z/-]+:[a-z]+-2026\.0[12]-[0-9a-f]{12}", name) for name in names)


def test_it_plays_the_commands_of_the_readme() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Try it")[2]
    block = re.search(r"```console\n(.*?)```", section, re.DOTALL)
    assert block is not None
    assert tuple(line.partition("#")[0].strip() for line in block[1].splitlines()) == fresh.COMMANDS


def test_a_command_that_fails_keeps_no_other_from_running() -> None:
    said: list[str] = []
    codes: Mapping[str, int] = {"make demo": 2, "make test": 0}
    played = fresh.play(fresh.COMMANDS, lambda command: codes[command], said.append)
    assert [(one.command, one.exit_code) for one in played] == [("make demo", 2), ("make test", 0)]
    assert "FAILED with exit code 2" in str(played[0])
    assert str(played[1]).endswith("passed")
    assert said == ["make demo ...", str(played[0]), "make test ...", str(played[1])]


@pytest.mark.parametrize("module", ["scripts.fresh", "scripts.base_image"])
def test_without_an_engine_it_says_what_to_install(tmp_path: Path, module: str) -> None:
    environment = {**os.environ, "PATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "install podman" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_an_engine_that_does_not_answer_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, exit_code in (("podman", 125), ("docker", 0)):
        (tmp_path / name).write_text(f"#!/bin/sh\nexit {exit_code}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert containers.find_engine().program == "docker"


def test_a_suite_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fresh.main(["--suite", "warty"])
    assert "bookworm" in capsys.readouterr().err
