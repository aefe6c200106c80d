"""``flip-obs``, on real ledgers, a real hub and a real bucket."""

from __future__ import annotations

import io
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flip_observability.cli import main
from flip_observability.constants import NO_HUB, FlareEvents, FlipEvents
from flip_observability.demo.bucket import EmbeddedBucket
from flip_observability.demo.hub import EmbeddedHub
from flip_observability.ledger import FILE_NAME, SCHEMA_VERSION, Entry, Ledger
from history import Run

MODEL_ID = "3a0b3f4e-0f1c-4c8b-9d2e-5b7a6c1d2e3f"
EVIL = "[bold red]x[/] \x1b]0;title\x07\x1b[2J\u202e\x9b31m"


class Result(NamedTuple):
    code: int
    out: str
    err: str


FlipObs = Callable[..., Result]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FLIP_OBSERVABILITY_DIR", str(tmp_path / "ledger"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def flip_obs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> FlipObs:
    def run(*arguments: object, stdin: str = "") -> Result:
        monkeypatch.setattr(sys, "argv", ["flip-obs", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return Result(int(end.value.code or 0), out, err)

    return run


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger") as ledger:
        yield ledger


def in_a_process(*arguments: str, python: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    code = f"{python}\nfrom flip_observability.cli import main\nmain()"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def trained(ledger: Ledger, status: str | None = "RESULTS_UPLOADED", **more: Any) -> Run:
    run = Run(ledger, **more)
    run.train({"site-1": 2, "site-2": 5})
    if status is not None:
        run.finish(status)
    return run


def unreadable(problem: str) -> Callable[[Path], None]:
    """A ledger that cannot be read."""

    def make(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        if problem == "damaged":
            (folder / FILE_NAME).write_bytes(b"this is no database" * 1_000)
            return
        Ledger(folder).close()
        with sqlite3.connect(folder / FILE_NAME) as database:
            database.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
        database.close()

    return make


# -- the program -----------------------------------------------------------------------------------------------------


def test_version_and_help(flip_obs: FlipObs) -> None:
    assert flip_obs("--version").out == "flip-observability 0.1.0\n"
    shown = flip_obs("--help")
    assert shown.code == 0
    assert all(command in shown.out for command in ("demo", "runs", "show", "outbox", "results"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("runs", "--status", "GREAT"),
        ("runs", "--since", "yesterday"),
        ("runs", "--since", "-1d"),
        ("runs", "--limit", "0"),
        ("show",),
        ("show", " "),
        ("outbox", "retry"),
        ("outbox", "retry", "1", "--all"),
        ("outbox", "retry", "one"),
        ("outbox", "drop"),
        ("results", "upload"),
        ("demo", "--scenario", "nonsense"),
    ],
)
def test_wrong_usage_is_2(flip_obs: FlipObs, ledger: Ledger, arguments: tuple[str, ...]) -> None:
    result = flip_obs(*arguments)
    assert (result.code, result.out) == (2, "")
    assert "Usage" in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs",),
        ("show", "x"),
        ("outbox", "list"),
        ("outbox", "retry", "--all"),
        ("outbox", "drop", "1"),
        ("results", "upload", "x"),
    ],
)
def test_a_missing_ledger_is_said_and_not_made(flip_obs: FlipObs, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = flip_obs(*arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert "No ledger in" in result.err
    assert "FLIP_OBSERVABILITY_DIR" in result.err
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize(("problem", "said"), [("damaged", "not a database"), ("newer", "newer flip-observability")])
@pytest.mark.parametrize("arguments", [("runs",), ("outbox", "retry", "--all")])
def test_a_ledger_that_cannot_be_read_is_one_line(
    flip_obs: FlipObs, tmp_path: Path, problem: str, said: str, arguments: tuple[str, ...]
) -> None:
    unreadable(problem)(tmp_path / "ledger")
    result = flip_obs(*arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert said in result.err


def test_an_error_of_our_own_is_one_line_and_debug_shows_it(ledger: Ledger) -> None:
    run = trained(ledger)
    with sqlite3.connect(ledger.path or "") as database:
        database.execute("ALTER TABLE events RENAME COLUMN name TO gone")
    database.close()
    quiet = in_a_process("show", run.run_id)
    assert (quiet.returncode, quiet.stdout) == (1, "")
    assert quiet.stderr == "flip-obs: Unexpected KeyError; flip-obs --debug shows where\n"
    loud = in_a_process("--debug", "show", run.run_id)
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr


def test_the_option_names_the_ledger_before_the_variable_and_a_default_comes_last(
    flip_obs: FlipObs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("by-option", "flip_observability"):
        with Ledger(tmp_path / name) as other:
            Run(other, model_id=name)
    assert flip_obs("runs").code == 1
    assert "by-option" in flip_obs("--dir", tmp_path / "by-option", "runs").out
    monkeypatch.delenv("FLIP_OBSERVABILITY_DIR")
    assert "flip_observability" in flip_obs("runs").out


def test_it_starts_without_the_heavy_packages() -> None:
    heavy = "{'nvflare', 'boto3', 'botocore', 'opentelemetry', 'moto', 'sklearn', 'numpy', 'requests'}"
    code = f"import flip_observability.cli, sys; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_the_demo_says_what_it_needs() -> None:
    result = in_a_process("demo", python="import sys; sys.modules['sklearn'] = None")
    assert (result.returncode, result.stdout) == (1, "")
    assert "scikit-learn" in result.stderr
    assert "pip install 'flip-observability[demo]'" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_goes_away_is_no_error_of_ours(ledger: Ledger) -> None:
    for _ in range(300):
        Run(ledger)
    program = f"{sys.executable} -c 'from flip_observability.cli import main; main()'"
    result = subprocess.run(
        ["bash", "-c", f"{program} runs --limit 1000 | head -1"], capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("run")
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_a_terminal_without_unicode(ledger: Ledger) -> None:
    run = Run(ledger)
    run.train({"Zürich": 2}, rounds=1)
    result = in_a_process("show", run.run_id, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert result.returncode == 0
    assert "Z\\xfcrich" in result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_completes_runs(ledger: Ledger, shell: str) -> None:
    runs = [trained(ledger), trained(ledger)]
    wanted = runs[0].run_id
    words = f"flip-obs show {wanted[:6]}"
    variables = {
        "bash": {"COMP_WORDS": words, "COMP_CWORD": "2"},
        "zsh": {"_TYPER_COMPLETE_ARGS": words},
        "fish": {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    result = in_a_process(**variables, _FLIP_OBS_COMPLETE=f"complete_{shell}")
    assert wanted in result.stdout
    assert runs[1].run_id not in result.stdout
    assert result.stderr == ""


HOSTILE_IDS = ("$(touch pwned)", "`touch pwned`", "; touch pwned #", "--help", 'a"b', "a:b", EVIL, MODEL_ID.upper())


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_is_offered_nothing_but_uuids(ledger: Ledger, shell: str) -> None:
    for hostile in HOSTILE_IDS:
        trained(ledger, run_id=hostile)
    run = trained(ledger, model_id="$(touch pwned)")
    ledger.append(Entry(run.run_id, 1.0, run={"status": "`touch pwned`"}))
    variables = {
        "bash": {"COMP_WORDS": "flip-obs show ", "COMP_CWORD": "2"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "flip-obs show "},
        "fish": {"_TYPER_COMPLETE_ARGS": "flip-obs show ", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    offered = in_a_process(**variables, _FLIP_OBS_COMPLETE=f"complete_{shell}").stdout
    assert run.run_id in offered
    assert "touch" not in offered
    assert not [hostile for hostile in HOSTILE_IDS if hostile in offered]


def test_a_hostile_run_id_is_shown_cleaned(flip_obs: FlipObs, ledger: Ledger) -> None:
    trained(ledger, run_id=EVIL)
    for arguments in (("runs",), ("show", EVIL[:5])):
        text = flip_obs(*arguments).out
        assert "\\x1b" in text
        assert not [c for c in text if not (c.isprintable() or c == "\n")]


def test_completion_without_a_ledger_is_silent() -> None:
    result = in_a_process(COMP_WORDS="flip-obs show ", COMP_CWORD="2", _FLIP_OBS_COMPLETE="complete_bash")
    assert (result.stdout.strip(), result.stderr) == ("", "")


# -- runs ------------------------------------------------------------------------------------------------------------


def test_runs_are_listed_newest_first(flip_obs: FlipObs, ledger: Ledger) -> None:
    old = trained(ledger, begin=time.time() - 5_000)
    old.deliver()
    new = trained(ledger, status=None)
    result = flip_obs("runs")
    assert result.code == 0
    lines = result.out.splitlines()
    assert lines[1].startswith(new.run_id)
    assert all(text in lines[1] for text in (new.model_id, "TRAINING_STARTED", "pending", "2/2", "net-1"))
    assert lines[2].startswith(old.run_id)
    assert all(text in lines[2] for text in (old.model_id, "RESULTS_UPLOADED", "accepted"))


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_what_is_listed_on_a_narrow_terminal_is_whole(
    flip_obs: FlipObs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    run = trained(ledger, status="RESULTS_UPLOAD_FAILED")
    monkeypatch.setenv("COLUMNS", str(width))
    lines = flip_obs("runs").out.splitlines()
    assert run.run_id[:8] in lines[1]
    if width >= 80:
        assert "RESULTS_UPLOAD_FAILED  pending" in lines[1]
        assert max(map(len, lines)) <= width


def test_runs_as_json(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = trained(ledger)
    (item,) = json.loads(flip_obs("runs", "--json").out)
    assert item["run_id"] == run.run_id
    assert item["status"] == "RESULTS_UPLOADED"
    assert item["final"] is True
    assert item["results"]["bytes"] == 2_048
    assert item["started"].endswith("+00:00")
    assert item["hub"]["state"] == "pending"


def test_runs_by_status(flip_obs: FlipObs, ledger: Ledger) -> None:
    by_status = {status: trained(ledger, status).run_id for status in ("RESULTS_UPLOADED", "ERROR", None)}

    def listed(*statuses: str) -> set[str]:
        options = [part for status in statuses for part in ("--status", status)]
        return {item["run_id"] for item in json.loads(flip_obs("runs", "--json", *options).out)}

    assert listed("ERROR") == {by_status["ERROR"]}
    assert listed("error", "RESULTS_UPLOADED") == {by_status["ERROR"], by_status["RESULTS_UPLOADED"]}
    assert listed("RUNNING") == listed("TRAINING_STARTED") == {by_status[None]}
    assert listed("STOPPED") == set()
    assert flip_obs("runs", "--status", "STOPPED").out == "No runs.\n"


def test_runs_by_age_and_number(flip_obs: FlipObs, ledger: Ledger) -> None:
    ages = {"new": 60, "today": 10 * 3_600, "this week": 3 * 86_400}
    ids = {name: Run(ledger, begin=time.time() - age).run_id for name, age in ages.items()}

    def listed(*options: str) -> list[str]:
        return [item["run_id"] for item in json.loads(flip_obs("runs", "--json", *options).out)]

    assert listed("--since", "1h") == listed("--since", "30m") == [ids["new"]]
    assert listed("--since", "24h") == listed("--since", "1.5 d") == [ids["new"], ids["today"]]
    assert listed("--since", "1w") == list(ids.values())
    assert listed("--limit", "2") == [ids["new"], ids["today"]]


# -- show ------------------------------------------------------------------------------------------------------------


def test_show_everything(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = trained(ledger)
    run.deliver()
    result = flip_obs("show", run.run_id)
    assert result.code == 0
    lines = [" ".join(line.split()) for line in result.out.splitlines()]
    assert f"model {run.model_id}" in lines
    assert any("TRAINING_STARTED superseded, " in line for line in lines)
    assert any("RESULTS_UPLOADED accepted, " in line for line in lines)
    assert any(line.startswith("controller 2 of 2") and line.endswith("6.0 s 2 of 2 done") for line in lines)
    assert any(line.startswith("site-2 2 5.0 s 5.0 s (round 1)") for line in lines)
    assert "checksum CRC32 3610a686" in lines
    assert any("+0.0 s start_run" in line for line in lines)
    assert not any("before_process_submission" in line for line in lines)
    assert "before_process_submission" in flip_obs("show", run.run_id, "--all").out


@pytest.mark.parametrize(
    ("contract", "ours", "hubs"),
    [
        ("2026-10", "TRAINING_STARTED", "RUNNING"),
        ("2026-10", "RESULTS_UPLOAD_FAILED", None),
        ("2026-05", "TRAINING_STARTED", None),
        ("2026-05", "RESULTS_UPLOAD_FAILED", "ERROR"),
        ("neither", "TRAINING_STARTED", None),  # what is no contract is the server's to complain of
    ],
)
def test_show_has_the_hubs_word_beside_ours(
    flip_obs: FlipObs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, contract: str, ours: str, hubs: str | None
) -> None:
    monkeypatch.setenv("FLIP_HUB_CONTRACT", contract)
    run = trained(ledger, status=None)
    run.tell("status", {"status": "RESULTS_UPLOAD_FAILED"})
    run.tell("status", {"status": "made up"})
    run.deliver()
    out = flip_obs("show", run.run_id).out
    assert re.search(rf"{ours} {re.escape(f'({hubs} to the hub)') if hubs else '+(accepted|superseded)'}", out), out
    statuses = json.loads(flip_obs("show", run.run_id, "--json").out)["statuses"]
    assert [line["hub_status"] for line in statuses if line["status"] == ours] == [hubs or ours]
    assert [line["hub_status"] for line in statuses if line["status"] == "made up"] == ["made up"]


def test_show_without_a_hub_has_no_word_of_it(
    flip_obs: FlipObs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLIP_HUB_CONTRACT", "2026-10")
    run = trained(ledger, status=None)
    run.deliver(outcome=NO_HUB)
    assert "to the hub" not in flip_obs("show", run.run_id).out


def test_the_timeline_tells_what_a_client_could_not_do(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = trained(ledger, status=None)
    run.at(30, FlareEvents.BEFORE_PROCESS_SUBMISSION, client="site-9", task_id="x", return_code="EXECUTION_EXCEPTION")
    run.at(31, FlareEvents.AFTER_CONTRIBUTION_ACCEPT, client="site-8", accepted=False)
    out = flip_obs("show", run.run_id).out
    assert "client=site-9 return_code=EXECUTION_EXCEPTION" in out
    assert "client=site-8 accepted=False" in out
    assert "accepted=True" not in out


def test_show_as_json(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = trained(ledger)
    whole = json.loads(flip_obs("show", run.run_id[:10], "--json").out)
    assert whole["run"]["run_id"] == run.run_id
    assert [line["round"] for line in whole["rounds"]] == [1, 2]
    assert len(whole["tasks"]) == 4
    assert whole["statuses"][-1]["status"] == "RESULTS_UPLOADED"


def test_a_run_is_found_by_any_of_its_ids(flip_obs: FlipObs, ledger: Ledger) -> None:
    wanted = Run(ledger, run_id="11111111-0000-4000-8000-000000000001", model_id="22222222-0000-4000-8000-000000000002")
    Run(ledger, run_id="33333333-0000-4000-8000-000000000003", model_id="44444444-0000-4000-8000-000000000004")
    for text in (
        "1",
        "1111",
        wanted.run_id,
        "2222",
        wanted.model_id,
        wanted.model_id.upper(),
        f"{{{wanted.model_id}}}",
    ):
        assert json.loads(flip_obs("show", "--json", text).out)["run"]["run_id"] == wanted.run_id


def test_several_runs_of_a_model(flip_obs: FlipObs, ledger: Ledger) -> None:
    first = Run(ledger, begin=time.time() - 1_000)
    second = Run(ledger, model_id=first.model_id)
    result = flip_obs("show", first.model_id[:12])
    assert (result.code, result.out) == (1, "")
    assert "ambiguous" in result.err
    assert first.run_id in result.err
    assert second.run_id in result.err
    newest = flip_obs("show", first.model_id, "--latest", "--json")
    assert json.loads(newest.out)["run"]["run_id"] == second.run_id


def test_a_whole_run_id_is_never_ambiguous(flip_obs: FlipObs, ledger: Ledger) -> None:
    first = Run(ledger)
    Run(ledger, model_id=first.run_id)
    assert json.loads(flip_obs("show", first.run_id, "--json").out)["run"]["run_id"] == first.run_id
    assert flip_obs("show", first.run_id[:20]).code == 1


@pytest.mark.parametrize("text", ["zzz", "%", "_", "' OR 1=1 --", "5f0c1a3e-77aa-4d0e-9d1c-0a4f6f5f9b11", "x" * 10_000])
def test_an_unknown_run(flip_obs: FlipObs, ledger: Ledger, text: str) -> None:
    Run(ledger)
    result = flip_obs("show", text)
    assert (result.code, result.out) == (1, "")
    assert "No run" in result.err
    assert len(result.err) < 3_000


def test_texts_from_runs_do_not_reach_the_terminal_as_commands(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = Run(ledger, run_dir=EVIL, model_id=EVIL)
    run.train({EVIL: 2, "n" * 10_000: 3}, rounds=1, workflow=EVIL)
    run.tell("metric", {"client": EVIL, "label": EVIL, "value": 1.0, "round": 1})
    run.finish()
    run.reject(EVIL)
    for arguments in (
        ("runs",),
        ("show", run.run_id, "--all"),
        ("show", run.run_id, "--json"),
        ("outbox", "list", "--all"),
        ("show", EVIL),
        ("outbox", "drop", 1, "--yes"),
    ):
        result = flip_obs(*arguments)
        text = result.out + result.err
        assert "\\x1b" in text or "\\u001b" in text
        assert not [c for c in text if not (c.isprintable() or c == "\n")]
        assert "n" * 300 not in text or "--json" in arguments
        assert "[bold red]x[/]" in text


# -- the outbox ------------------------------------------------------------------------------------------------------


def test_the_outbox_shows_what_needs_attention(flip_obs: FlipObs, ledger: Ledger) -> None:
    assert flip_obs("outbox", "list").out == "Nothing is left that the hub has to be told.\n"
    run = trained(ledger, status=None)
    run.deliver()
    run.tell("log", {"client": "site-1", "log": "ACC-4711 of J. Doe"})
    run.finish("ERROR")
    result = flip_obs("outbox", "list")
    assert result.code == 0
    assert "final status" in result.out
    assert "client=site-1" in result.out
    assert "4711" not in result.out
    assert "TRAINING_STARTED" not in result.out
    assert "TRAINING_STARTED" in flip_obs("outbox", "list", "--all").out
    rows = json.loads(flip_obs("outbox", "list", "--json").out)
    assert [(row["kind"], row["final"], row["hub"]["state"]) for row in rows] == [
        ("log", False, "pending"),
        ("status", True, "pending"),
    ]


def test_retry_makes_a_message_due(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = trained(ledger)
    run.reject()
    final = ledger.outbox(states=["rejected"])[-1]
    result = flip_obs("outbox", "retry", final.id)
    assert (result.code, result.out) == (0, "1 of 1 will be sent again.\n")
    assert [row.id for row in ledger.outbox(states=["pending"])] == [final.id]


def test_retry_of_what_would_take_the_hub_back_is_refused(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = trained(ledger, status=None)
    run.reject()
    run.finish()
    run.deliver()
    rows = {row.id: row.state for row in ledger.outbox()}
    for row_id, state in rows.items():
        result = flip_obs("outbox", "retry", row_id)
        assert (result.code, result.out) == (1, "0 of 1 will be sent again.\n")
        assert ("accepted it" if state == "delivered" else "is past") in result.err
    assert flip_obs("outbox", "retry", "--all").code == 0
    assert {row.id: row.state for row in ledger.outbox()} == rows


def test_an_unknown_id_changes_nothing(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = trained(ledger)
    run.reject()
    row = ledger.outbox(states=["rejected"])[0]
    for command in (("retry", row.id, 4711), ("drop", row.id, 4711, "--yes")):
        result = flip_obs("outbox", *command)
        assert result.code == 1
        assert "Not in the outbox: 4711" in result.err
    assert ledger.outbox(states=["rejected"])[0].id == row.id


def test_drop_asks_and_warns_of_a_final_status(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = trained(ledger)
    final = ledger.outbox(states=["pending"])[-1]
    for answer in ("n\n", ""):
        result = flip_obs("outbox", "drop", final.id, stdin=answer)
        assert result.code == 1
        assert f"final status of model {run.model_id}" in result.err
        assert ledger.outbox(states=["pending"])[-1].id == final.id
    result = flip_obs("outbox", "drop", final.id, stdin="y\n")
    assert result.code == 0
    assert result.out.endswith("1 of 1 dropped.\n")
    assert [row.id for row in ledger.outbox(states=["dropped"])] == [final.id]


def test_drop_without_asking(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = Run(ledger)
    run.tell("metric", {"client": "site-1", "label": "loss", "value": 1.0, "round": 1})
    result = flip_obs("outbox", "drop", 1, "--yes")
    assert (result.code, result.err) == (0, "")
    assert ledger.outbox()[0].state == "dropped"


def test_what_the_hub_has_cannot_be_dropped(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = trained(ledger)
    run.deliver()
    delivered = ledger.outbox(states=["delivered"])[-1]
    result = flip_obs("outbox", "drop", delivered.id, "--yes")
    assert (result.code, result.out.splitlines()[-1]) == (1, "0 of 1 dropped.")
    assert ledger.outbox(states=["delivered"])[-1].id == delivered.id


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmbeddedHub]:
    with EmbeddedHub() as hub:
        monkeypatch.setenv("LOCAL_DEV", "false")
        monkeypatch.setenv("FLIP_API_INTERNAL_URL", hub.url)
        monkeypatch.setenv("INTERNAL_SERVICE_KEY", hub.key)
        yield hub


def test_retry_can_send_by_itself(flip_obs: FlipObs, ledger: Ledger, hub: EmbeddedHub) -> None:
    run = trained(ledger)
    run.reject("404")
    final = ledger.outbox(states=["rejected"])[-1]
    result = flip_obs("outbox", "retry", final.id, "--send")
    assert (result.code, result.out, result.err) == (0, "1 of 1 accepted by the hub.\n", "")
    assert hub.statuses(run.model_id) == ["RESULTS_UPLOADED"]
    assert "RESULTS_UPLOADED  accepted" in flip_obs("show", run.run_id).out


def test_what_the_hub_does_not_take_stays(flip_obs: FlipObs, ledger: Ledger, hub: EmbeddedHub) -> None:
    trained(ledger)
    hub.fail_with(503)
    result = flip_obs("outbox", "retry", "--all", "--send")
    assert (result.code, result.out) == (1, "0 of 1 accepted by the hub.\n")
    assert "is pending: the hub's answer was 503" in result.err
    assert hub.key not in result.out + result.err
    assert len(ledger.outbox(states=["pending"])) == 1


def test_sending_to_no_hub_is_refused(flip_obs: FlipObs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(ledger)
    monkeypatch.setenv("LOCAL_DEV", "true")
    result = flip_obs("outbox", "retry", "--all", "--send")
    assert (result.code, result.out) == (1, "")
    assert "LOCAL_DEV is true" in result.err
    assert len(ledger.outbox(states=["pending"])) == 1


def test_settings_that_cannot_be_used(flip_obs: FlipObs, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(ledger)
    monkeypatch.setenv("LOCAL_DEV", "false")
    monkeypatch.setenv("INTERNAL_SERVICE_KEY", " secret-4711")
    result = flip_obs("outbox", "retry", "--all", "--send")
    assert (result.code, result.out) == (1, "")
    assert result.err.count("\n") == 1
    assert "INTERNAL_SERVICE_KEY" in result.err
    assert "4711" not in result.err
    assert flip_obs("runs").code == 0, "what only looks into the ledger needs no settings"


# -- results ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    (folder / "app_server").mkdir(parents=True)
    (folder / "log.txt").write_text("what happened\n")
    (folder / "app_server" / "FL_global_model.pt").write_bytes(b"weights" * 1_000)
    return folder


def members(archive: Path) -> list[str]:
    with zipfile.ZipFile(archive) as opened:
        assert opened.testzip() is None
        return sorted(opened.namelist())


def test_results_go_to_a_bucket(
    flip_obs: FlipObs, ledger: Ledger, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(ledger, "ERROR", run_dir=str(run_dir))
    with EmbeddedBucket() as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LOCAL_DEV", "false")
        monkeypatch.setenv("INTERNAL_SERVICE_KEY", "key-4711")
        monkeypatch.setenv("UPLOADED_FEDERATED_DATA_BUCKET", bucket.destination)
        result = flip_obs("results", "upload", run.run_id[:8])
        assert (result.code, result.err) == (0, "")
        (item,) = bucket.objects()
        archive = bucket.download(item.key, tmp_path / "back.zip")
        checksum = bucket.checksum(item.key)
    row = ledger.run(run.run_id)
    assert row is not None
    assert members(archive) == ["FL_global_model.pt", "log.txt"]
    assert row["results_uri"] == f"s3://{bucket.name}/{item.key}"
    assert (row["results_bytes"], row["results_files"]) == (archive.stat().st_size, 2)
    assert checksum == f"CRC32 {row['results_crc32']}"
    assert row["upload_id"] is None
    assert row["final_status"] == "ERROR", "sending results again decides nothing"
    for shown in (row["results_uri"], str(row["results_bytes"]), checksum):
        assert shown in result.out
        assert shown in flip_obs("show", run.run_id).out


def test_a_bucket_that_refuses(
    flip_obs: FlipObs, ledger: Ledger, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(ledger, "ERROR", run_dir=str(run_dir))
    with EmbeddedBucket(refusing=True) as bucket:
        for name, value in bucket.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("LOCAL_DEV", "false")
        monkeypatch.setenv("INTERNAL_SERVICE_KEY", "key-4711")
        monkeypatch.setenv("UPLOADED_FEDERATED_DATA_BUCKET", bucket.destination)
        result = flip_obs("results", "upload", run.run_id)
    assert (result.code, result.out) == (1, "")
    assert "access_denied" in result.err
    assert f"still in {run_dir}" in result.err
    assert bucket.environment["AWS_SECRET_ACCESS_KEY"] not in result.err
    row = ledger.run(run.run_id)
    assert row is not None
    assert row["results_uri"] is None


def test_without_a_hub_results_go_beside_the_ledger(
    flip_obs: FlipObs, ledger: Ledger, run_dir: Path, tmp_path: Path
) -> None:
    run = trained(ledger, status=None, run_dir=str(run_dir))
    result = flip_obs("results", "upload", run.run_id)
    assert result.code == 0
    assert "LOCAL_DEV is true" in result.err
    assert "no final status yet" in result.err
    (archive,) = (tmp_path / "ledger" / "results" / run.model_id).glob("*.zip")
    assert members(archive) == ["FL_global_model.pt", "log.txt"]
    assert archive.as_uri() in result.out


def test_what_is_not_in_the_archive_is_said(flip_obs: FlipObs, ledger: Ledger, run_dir: Path) -> None:
    (run_dir / "key").symlink_to("/etc/hostname")
    run = trained(ledger, run_dir=str(run_dir))
    result = flip_obs("results", "upload", run.run_id)
    assert result.code == 0
    assert "is a link and was not followed" in result.err


@pytest.mark.parametrize(
    ("run_dir", "said"), [("", "knows no run directory"), ("/nowhere/4711", "is not here any more")]
)
def test_a_run_without_its_directory(flip_obs: FlipObs, ledger: Ledger, run_dir: str, said: str) -> None:
    run = trained(ledger, run_dir=run_dir)
    result = flip_obs("results", "upload", run.run_id)
    assert (result.code, result.out) == (1, "")
    assert said in result.err


def test_a_rejected_run_shows_its_problem(flip_obs: FlipObs, ledger: Ledger) -> None:
    run = Run(ledger)
    run.at(0, FlareEvents.START_RUN)
    run.at(1, FlipEvents.TRAINING_INITIATED)
    run.reject()
    assert "hub_rejected" in flip_obs("runs").out
    assert "rejected, " in flip_obs("show", run.run_id).out
