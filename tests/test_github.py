"""What runs on GitHub is well-formed, has no right that it does not need, and installs from the locks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".github"
WORKFLOWS = sorted((FOLDER / "workflows").glob("*.yml"))


def load(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize(
    ("schema", "paths"), [("vendor.github-workflows", WORKFLOWS), ("vendor.dependabot", [FOLDER / "dependabot.yml"])]
)
def test_it_keeps_to_githubs_schema(schema: str, paths: list[Path], tmp_path: Path) -> None:
    def check(*files: Path) -> int:
        command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *map(str, files)]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode

    assert paths
    assert check(*paths) == 0
    broken = tmp_path / paths[0].name
    broken.write_text(re.sub("^(jobs|updates):", "things:", paths[0].read_text(), flags=re.MULTILINE))
    assert check(broken) != 0


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_may_only_read_and_its_jobs_end(path: Path) -> None:
    workflow = load(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert all(job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())
    writing = {
        (name, right)
        for name, job in workflow["jobs"].items()
        for right, level in job.get("permissions", {}).items()
        if level == "write"
    }
    allowed = {
        "ci": set(),
        "release": {("build", "id-token"), ("build", "attestations"), ("publish", "id-token"), ("release", "contents")},
    }
    assert writing == allowed[path.stem]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_shells_are_given_no_foreign_text(path: Path) -> None:
    for step in steps(path):
        assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+(\.\d+\.\d+)?|[0-9a-f]{40})", step.get("uses", "a/b@v1")), step
        assert "${{" not in step.get("run", ""), "an expression in a script is a way in: hand it over by env"
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"] == {"persist-credentials": False}
    assert "pull_request_target" not in path.read_text()


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_only_the_makefile_and_ci_install(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for step in steps(path):
        assert "pip " not in step.get("run", "")
        assert set(re.findall(r"\bmake ([a-z-]+)", step.get("run", ""))) <= targets


def test_all_versions_of_python_are_tested() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    assert load(FOLDER / "workflows" / "ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"] == versions


def test_whoever_finds_something_is_told_what_to_do() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    (minor,) = re.findall(r'^version = "(\d+\.\d+)\.', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert f"| {minor} | yes |" in text
    assert not re.search(r"\S+@\S+", text), "an address that nobody reads"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / link).is_file(), link
