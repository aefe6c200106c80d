"""The benchmarks' own parts, and that the documentation says what they found."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import benchmarks.__main__ as command
import pytest
import typer
from benchmarks import jobs, plots
from benchmarks.goals import GOALS
from benchmarks.measure import ROOT, Effort, Figure, child, p99, spread, turns

RESULTS: dict[str, Any] = json.loads(plots.RESULTS.read_text(encoding="utf-8"))


def test_every_figure_was_measured_in_full() -> None:
    assert list(RESULTS["figures"]) == list(GOALS)
    assert RESULTS["quick"] is False
    assert {"cpu", "cores", "memory_gib", "python", "system"} <= RESULTS["machine"].keys()


@pytest.mark.parametrize("key", list(GOALS))
def test_a_figure_says_what_a_reader_needs(key: str) -> None:
    entry = RESULTS["figures"][key]
    assert entry["unit"] == GOALS[key].unit
    assert entry["goal"] == str(GOALS[key])
    assert entry["meaning"] == GOALS[key].meaning
    assert entry["reached"] == GOALS[key].is_reached(entry["value"])
    assert entry["spread"][0] <= entry["spread"][1]


def test_the_document_and_its_pictures_are_made_from_the_results() -> None:
    document = plots.DOCUMENT.read_text(encoding="utf-8")
    assert plots.with_table(document, RESULTS) == document, "make bench-plots"
    assert plots.GOALS_PICTURE.read_text(encoding="utf-8") == plots.goals_picture(RESULTS), "make bench-plots"
    assert plots.EVENTS_PICTURE.read_text(encoding="utf-8") == plots.events_picture(RESULTS), "make bench-plots"


@pytest.mark.parametrize("key", list(GOALS))
def test_the_document_names_the_figure(key: str) -> None:
    assert f"`{key}`" in plots.DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [("upload_speedup", 7.0, 6.9), ("upload_limit_ratio", 1.3, 1.31), ("upload_temp_bytes", 0.0, 1.0)],
)
def test_a_goal_is_reached_up_to_its_limit(key: str, good: float, bad: float) -> None:
    assert GOALS[key].is_reached(good)
    assert not GOALS[key].is_reached(bad)


def test_what_is_only_reported_misses_nothing() -> None:
    assert GOALS["ledger_bytes_per_event"].is_reached(1e9)
    assert str(GOALS["ledger_bytes_per_event"]) == "-"


def test_turns_change_who_goes_first() -> None:
    order: list[str] = []

    def side(name: str, value: float) -> float:
        order.append(name)
        return value

    assert turns(lambda: side("one", 1.0), lambda: side("other", 2.0), 3) == [(1.0, 2.0)] * 3
    assert order == ["one", "other", "other", "one", "one", "other"]


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    figure = spread("upload_speedup", [5.0, 1.0, 2.0, 4.0, 3.0], note="x")
    assert (figure.value, figure.low, figure.high) == (3.0, 2.0, 4.0)
    assert figure.about == {"turns": 5, "note": "x"}
    assert p99(range(1, 102)) == 100.0


@pytest.mark.parametrize(("value", "code"), [(8.0, 0), (6.0, 1)], ids=["reached", "missed"])
def test_a_missed_goal_is_exit_1_and_the_others_figures_stay(
    value: float, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(effort: Effort) -> Iterable[Figure]:
        assert effort.of(2, 1) == 1
        yield spread("upload_speedup", [value])

    monkeypatch.setitem(command.GROUPS, "uploads", measured)
    output = tmp_path / "results.json"
    output.write_text(json.dumps({"figures": {"deliveries_per_s": {"value": 300}}}))
    with pytest.raises(SystemExit) as ended:
        command.main(quick=True, only=["uploads"], output=output)
    assert ended.value.code == code
    written = json.loads(output.read_text())
    assert list(written["figures"]) == ["upload_speedup", "deliveries_per_s"]
    assert written["figures"]["upload_speedup"]["reached"] is (code == 0)
    assert ("Missed: upload_speedup" in capsys.readouterr().out) is (code == 1)


def test_what_could_not_be_written_in_the_end_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(effort: Effort) -> Iterable[Figure]:
        raise AssertionError("it was measured")

    monkeypatch.setattr(command, "GROUPS", {"uploads": measured})
    damaged = tmp_path / "damaged.json"
    damaged.write_text("{")
    for output, problem in ((tmp_path / "none" / "x.json", "written"), (tmp_path, "written"), (damaged, "no figures")):
        with pytest.raises(typer.BadParameter, match=problem):
            command.main(only=["uploads"], output=output)
    assert damaged.read_text() == "{"


def test_a_group_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="there is no group nothing"):
        command.main(only=["nothing"], output=tmp_path / "results.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rounds", [5, jobs.ROUNDS])
def test_a_quick_look_tells_what_all_rounds_take(rounds: int) -> None:
    looks = [{"process": 3.0 + 2.0 * number, "ours": 0.2 + 0.1 * number} for number in range(rounds)]
    looks.append({"process": looks[-1]["process"] + 2.5, "ours": looks[-1]["ours"] + 0.4})
    seconds = jobs.Seconds.of(looks)
    assert (seconds.process, seconds.ours) == pytest.approx((3.0 + 2.0 * 49 + 2.5, 0.2 + 0.1 * 49 + 0.4))


@pytest.mark.system
def test_the_account_of_a_job_holds_what_components_and_their_threads_take_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "component.py").write_text(
        """
import threading, time

def work(seconds):
    begun = time.thread_time()
    while time.thread_time() - begun < seconds:
        pass

def thread(name, seconds):
    started = threading.Thread(target=work, args=(seconds,), name=name, daemon=True)
    started.start()
    started.join()

class Component:
    def handle_event(self, event_type, fl_ctx):
        work(0.2)

work(0.1)  # as an import does
"""
    )
    code = """
import threading, time
from benchmarks.model import Accounts
Accounts([])
assert Accounts.total() == 0
Accounts(["component.Component"])
import component
component.Component().handle_event("_x", None)
component.thread("flip-ended", 0.4)
component.thread("theirs", 2.0)
living = threading.Thread(target=lambda: (component.work(0.8), time.sleep(60)), name="flip-living", daemon=True)
living.start()
while Accounts.total() < 1.5:
    time.sleep(0.01)
time.sleep(0.2)
print(Accounts.total())
"""
    total = float(child(code, environment={"PYTHONPATH": f"{ROOT}:{tmp_path}"}))
    assert 1.5 <= total < 1.9
