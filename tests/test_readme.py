"""The documents say what is so. Run as a program, this writes the README's table of settings anew."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pydantic import SecretStr
from pydantic.fields import FieldInfo

from flip_observability.settings import Settings

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
BEGIN, END = "<!-- settings: made from settings.py by tests/test_readme.py -->\n", "<!-- /settings -->"


def settings_table() -> str:
    """The table of settings as the README must have it."""
    rows = [
        f"| `{field.alias}` | {_default(field)} | {field.description} |" for field in Settings.model_fields.values()
    ]
    return "\n".join(["| variable | default | meaning |", "| --- | --- | --- |", *rows, ""])


def _default(field: FieldInfo) -> str:
    value = field.default
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value in (None, ""):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _with_table(text: str) -> str:
    before, _, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, "the README has lost the place of its table of settings"
    return before + BEGIN + settings_table() + END + after


def test_every_setting_is_in_the_readme_as_it_is() -> None:
    assert all(field.alias and field.description for field in Settings.model_fields.values())
    text = README.read_text(encoding="utf-8")
    assert text == _with_table(text), "run: .venv/bin/python tests/test_readme.py"


def test_the_table_follows_the_settings() -> None:
    lines = settings_table().splitlines()
    assert len(lines) == 2 + len(Settings.model_fields)
    assert "| `LOCAL_DEV` | `true` | No hub, no bucket:" in settings_table()
    assert any(line.startswith("| `INTERNAL_SERVICE_KEY` |  |") for line in lines)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        linked = document.parent / path if path else document
        assert linked.is_file(), f"{document.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in headings}, target


def test_every_command_that_is_mentioned_exists() -> None:
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    mentioned = set(re.findall(r"flip-obs (?:--dir \S+ )?((?:outbox |results )?[a-z]+)", text))
    assert {"runs", "show", "outbox list", "outbox retry", "outbox drop", "results upload", "demo"} <= mentioned
    for command in sorted(mentioned):
        call = [sys.executable, "-m", "flip_observability.cli", *command.split(), "--help"]
        assert subprocess.run(call, capture_output=True, check=False).returncode == 0, f"flip-obs {command}"


def test_every_make_target_that_is_mentioned_exists() -> None:
    text = "\n".join(document.read_text(encoding="utf-8") for document in DOCUMENTS)
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    mentioned = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
    assert {"demo", "test"} <= mentioned <= targets


def test_every_module_that_is_mentioned_exists() -> None:
    package = ROOT / "src" / "flip_observability"
    for document in DOCUMENTS:
        for name in re.findall(r"`([a-z_]+\.py)`", document.read_text(encoding="utf-8")):
            assert (package / name).is_file(), f"{document.name} speaks of {name}"


def test_every_component_that_is_mentioned_exists() -> None:
    from flip_observability.nvflare import components

    text = README.read_text(encoding="utf-8")
    for name in re.findall(r"flip_observability\.nvflare\.components\.([A-Z]\w+)", text):
        assert name == "X" or hasattr(components, name)
    for name in ("ServerEventHandler", "PersistToS3AndCleanup", "ValidationJsonGenerator", "EvaluationJsonGenerator"):
        assert name in text
        assert hasattr(components, name)


def test_the_picture_is_well_formed_and_called_what_it_is() -> None:
    root = ElementTree.parse(ROOT / "docs" / "overview.svg").getroot()
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None
    assert str(title.text).startswith("Diagram")
    assert "![Diagram" in README.read_text(encoding="utf-8")


def test_the_changelog_tells_of_this_version() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version is not None
    assert version[1] in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    needs = re.search(r'"(nvflare[^"]+)"', project)
    assert needs is not None
    assert needs[1] in README.read_text(encoding="utf-8")


if __name__ == "__main__":
    README.write_text(_with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
