"""The real Prometheus and Alertmanager of the tests, and the script that fetches them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import pytest

import prometheus_tools
from prometheus_tools import FETCH, Alertmanager, Prometheus, Webhook, require, static_page
from waiting import wait_for

pytestmark = pytest.mark.system


def _fetch(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [shutil.which("bash") or "bash", str(FETCH)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def _path_without_prometheus(folder: Path) -> str:
    """A folder of links to what is in /usr/bin and /bin, but for the programs in question."""
    folder.mkdir()
    hidden = {name for names in prometheus_tools.PROGRAMS.values() for name in names}
    for source in (Path("/usr/bin"), Path("/bin")):
        for program in source.iterdir():
            link = folder / program.name
            if program.name not in hidden and not link.is_symlink():
                link.symlink_to(program)
    return str(folder)


def test_a_prometheus_scrapes_evaluates_keeps_exemplars_and_survives_a_restart(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yml"
    rule = {"alert": "Low", "expr": "answer < 43", "labels": {"severity": "page"}}
    rules.write_text(json.dumps({"groups": [{"name": "g", "rules": [rule]}]}))
    with static_page(lambda: "answer 42\n") as target, Webhook() as hook:
        route = {"receiver": "hook", "group_wait": "0s"}
        receiver = {"name": "hook", "webhook_configs": [{"url": f"{hook.url}/low"}]}
        with (
            Alertmanager(json.dumps({"route": route, "receivers": [receiver]})) as manager,
            Prometheus([target], rules=[rules], alertmanagers=[manager.address]) as prometheus,
        ):
            prometheus.wait_for_scrape()
            assert prometheus.value("answer") == 42
            assert prometheus.value("nothing") is None
            assert prometheus.series("answer")[0]["instance"] == target
            assert target in prometheus.label_values("instance", "answer")
            assert prometheus.exemplars("answer", time.time() - 60, time.time()) == []
            with pytest.raises(AssertionError, match="parse error"):
                prometheus.query("answer{")
            wait_for(lambda: prometheus.alerts("Low"), 30, "the alert")
            message = wait_for(lambda: hook.notifications("/low"), 30, "the notification")[0]
            assert message["alerts"][0]["labels"]["alertname"] == "Low"
            assert prometheus.rules()[0]["name"] == "Low"
            before = time.time()
            prometheus.stop()
            prometheus.start()
            assert prometheus.value("answer", at=before) == 42


def test_a_server_that_cannot_start_says_why() -> None:
    manager = Alertmanager("route: nonsense")
    with pytest.raises(AssertionError, match="does not start"):
        manager.start()
    assert not manager.folder.exists()


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-02T03:04:05.123456789Z", 0.123456789),
        ("2026-01-02T03:04:05Z", 0.0),
        ("2026-01-02T04:04:05.5+01:00", 0.5),
        ("2026-01-02T04:04:05+01:00", 0.0),
    ],
)
def test_prometheus_times_are_understood(text: str, moment: float) -> None:
    whole = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc).timestamp()
    assert prometheus_tools._seconds(text) == pytest.approx(whole + moment, abs=1e-6)


def test_the_script_finds_what_is_there(tmp_path: Path) -> None:
    require("prometheus")
    result = _fetch(PATH=f"{require('promtool').parent}:{os.environ['PATH']}", HOME=str(tmp_path))
    assert result.returncode == 0
    assert "on the PATH" in result.stdout
    assert not list(tmp_path.iterdir())


def test_the_script_unpacks_the_packages_into_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("apt-get") is None:
        pytest.skip("no apt-get on this machine")
    path, home = _path_without_prometheus(tmp_path / "bin"), tmp_path / "home"
    home.mkdir()
    first = _fetch(PATH=path, HOME=str(home))
    assert first.returncode == 0, first.stderr
    if "could not be fetched" in first.stdout:
        pytest.skip(first.stdout.strip())
    assert "nothing was installed" in first.stdout
    assert f"in {home}/.cache/flip-observability/prometheus" in _fetch(PATH=path, HOME=str(home)).stdout
    assert [entry.name for entry in (home / ".cache/flip-observability").iterdir()] == ["prometheus"]

    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / ".cache"))
    for program in prometheus_tools.PROGRAMS:
        found = prometheus_tools.find(program)
        assert found is not None
        assert found.is_relative_to(home)
    with static_page(lambda: "answer 42\n") as target, Prometheus([target]) as prometheus:
        prometheus.wait_for_scrape()
        assert prometheus.value("answer") == 42
    with Alertmanager('{"route": {"receiver": "none"}, "receivers": [{"name": "none"}]}') as manager:
        assert manager.alerts() == []


def test_without_a_package_manager_the_script_says_so_and_succeeds(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("wc", "dirname", "bash"):
        (folder / name).symlink_to(shutil.which(name) or "")
    result = _fetch(PATH=str(folder), HOME=str(tmp_path))
    assert result.returncode == 0
    assert "no Debian or Ubuntu" in result.stdout


def test_a_missing_program_skips_its_tests_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match=r"fetch-prometheus\.sh fetches it"):
        require("prometheus")
