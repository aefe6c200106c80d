"""The fold: every fact counted exactly once, whatever dies, whoever folds at the same time, whatever is malformed."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flip_observability import _fold
from flip_observability._catalogue import BY_FACT, BY_NAME, Metric
from flip_observability._fold import MetricsFold, Series, load_series, merged, series_of
from flip_observability.ledger import FILE_NAME, Entry, Ledger, LedgerError
from flip_observability.lifecycle import Event, Fact
from flip_observability.recorder import RunIdentity, RunRecorder
from flip_observability.settings import Settings

RUN = "0b1f7f5e-7b1e-4b62-9a52-0d0d63a1f6aa"
OLD = 1_000.0

FACTS: tuple[Fact, ...] = (
    ("run_started", 1, {}),
    ("run_finished", 1, {"status": "ERROR"}),
    ("hub_request", 3, {"kind": "status", "outcome": "retried"}),
    ("round_duration", 12.5, {}),
    ("client_task_duration", 4, {"client": "site-1", "task": "train"}),
    ("upload_failure", 1, {"reason": "timeout"}),
)
TOTALS = {"run_started": "flip_runs_started_total", "round_duration": "flip_round_duration_seconds"}


@pytest.fixture(autouse=True)
def _warn_anew() -> None:
    _fold._warned.clear()


def write(ledger: Ledger, *facts: Fact, name: str = "_start_run", at: float = OLD, run_id: str = RUN) -> None:
    ledger.append(Entry(run_id, at, Event(name, at), facts))


def totals(ledger: Ledger) -> dict[tuple[str, tuple[str, ...]], float]:
    """What has been counted, by metric and label values, without what is 0."""
    state = load_series(ledger.metric_state())
    return {(name, key): series.total for name, found in state.items() for key, series in found.items() if series.total}


def counted(ledger: Ledger, name: str, *key: str) -> float:
    return totals(ledger).get((name, key), 0.0)


def expected(facts: Iterable[Fact], events: int, event: str = "start_run") -> dict[tuple[str, tuple[str, ...]], float]:
    sums: defaultdict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
    for name, value, labels in facts:
        metric = BY_FACT[name]
        sums[metric.name, metric.label_values(labels)] += value
    return dict(sums) | ({("flip_lifecycle_events_total", (event,)): float(events)} if events else {})


# -- exactly once ----------------------------------------------------------------------------------------------------


class DyingLedger(Ledger):
    """A ledger whose process dies in the middle of the transaction of a fold."""

    def fold_metrics(
        self,
        cursor: int,
        upto: int,
        names: Iterable[str],
        merge: Callable[[list[tuple[str, str, str]]], Iterable[tuple[str, str, str]]],
    ) -> bool:
        def dies(rows: list[tuple[str, str, str]]) -> Iterator[tuple[str, str, str]]:
            changed = list(merge(rows))
            yield from changed[: len(changed) // 2 + 1]
            raise ZeroDivisionError

        return super().fold_metrics(cursor, upto, names, dies)


class World:
    """A ledger, two folders on connections of their own, and what must have been counted."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.facts: list[Fact] = []
        self.events = 0
        self.open()

    def open(self) -> None:
        self.ledger = Ledger(self.directory)
        self.others = [Ledger(self.directory), Ledger(self.directory)]
        self.folds = [MetricsFold(other, batch=2) for other in self.others]

    def append(self, facts: tuple[Fact, ...], at: float) -> None:
        self.ledger.append(Entry(RUN, OLD, final_status="ERROR", final_by="job"))  # it may have been forgotten
        write(self.ledger, *facts, at=at)
        self.facts += facts
        self.events += 1

    def fold_once(self, which: int) -> None:
        self.folds[which]._ledger.use(self.folds[which]._step)

    def fold_late(self, which: int) -> None:
        """Another folder is quicker, between what this one reads and what it writes."""
        cursor, events = self.others[which].unread_events(2)
        self.fold_once(1 - which)
        if events:
            deltas, _ = _fold.fold_events(events)
            won = self.others[which].fold_metrics(
                cursor, events[-1].id, list(deltas), lambda rows: merged(deltas, rows)
            )
            assert not won

    def die(self, which: int) -> None:
        with DyingLedger(self.directory) as dying:
            if dying.unread_events(1)[1]:
                with pytest.raises(ZeroDivisionError):
                    MetricsFold(dying, batch=3).catch_up()

    def forget(self, which: int) -> None:
        self.ledger.forget_before(2 * OLD)

    def reopen(self, which: int = 0) -> None:
        self.close()
        self.open()

    def close(self) -> None:
        for ledger in (self.ledger, *self.others):
            ledger.close()


STEPS = (World.fold_once, World.fold_late, World.die, World.forget, World.reopen)
appends = st.tuples(st.lists(st.sampled_from(FACTS), max_size=3).map(tuple), st.floats(0, OLD))
steps = st.one_of(appends, st.tuples(st.sampled_from(STEPS), st.integers(0, 1)))


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=25))
def test_any_order_of_things_counts_every_fact_once(script: list[tuple[Any, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for what, how in script:
            if callable(what):
                what(world, how)
            else:
                world.append(what, how)
        assert all(fold.catch_up() for fold in world.folds)
        world.forget(0)
        assert totals(world.ledger) == pytest.approx(expected(world.facts, world.events))
        assert world.ledger.events() == []
        world.close()


def test_what_is_not_counted_is_not_forgotten(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        write(ledger, ("run_started", 1, {}))
        ledger.append(Entry(RUN, OLD, Event("_end_run", OLD), final_status="ERROR", final_by="job"))
        ledger.append(Entry(None, OLD, Event("flip.observability_errors", OLD)))
        assert MetricsFold(ledger, batch=1)._step(ledger) is False  # one of three
        ledger.forget_before(2 * OLD)
        assert len(ledger.events()) == 2
        assert ledger.run(RUN) is not None
        assert MetricsFold(ledger).catch_up()
        ledger.forget_before(2 * OLD)
        assert ledger.events() == []
        assert ledger.run(RUN) is None
        assert counted(ledger, "flip_runs_started_total") == 1


def test_a_recorder_counts_before_it_forgets(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        write(ledger, ("run_started", 1, {}), at=OLD)
        ledger.append(Entry(RUN, OLD, Event("_end_run", OLD), final_status="ERROR", final_by="job"))
        recorder = RunRecorder(RunIdentity(str(uuid.uuid4())), Settings(), tmp_path)
        deadline = time.monotonic() + 30
        while ledger.run(RUN) is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        recorder.close()
        assert ledger.run(RUN) is None
        assert counted(ledger, "flip_runs_started_total") == 1


FOLDER = """
import sys, time
from pathlib import Path
from flip_observability.ledger import Ledger
from flip_observability._fold import MetricsFold
fold = MetricsFold(Ledger(Path(sys.argv[1])), batch=7)
print("folds", flush=True)
while True:
    fold.catch_up()
"""


def start_folder(directory: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", FOLDER, str(directory)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "folds\n"
    return process


def test_folding_processes_are_killed_again_and_again(tmp_path: Path) -> None:
    rng = random.Random(7)
    ledger = Ledger(tmp_path)
    stop = threading.Event()
    written: list[Fact] = []

    def write_on() -> None:
        with Ledger(tmp_path) as mine:
            while not stop.is_set():
                facts = tuple(rng.choices(FACTS, k=2))
                write(mine, *facts)
                written.extend(facts)

    writer = threading.Thread(target=write_on)
    writer.start()
    folders = [start_folder(tmp_path), start_folder(tmp_path)]
    try:
        for turn in range(5):
            time.sleep(rng.uniform(0.05, 0.2))
            os.kill(folders[turn % 2].pid, signal.SIGKILL)
            folders[turn % 2].wait()
            folders[turn % 2] = start_folder(tmp_path)
    finally:
        stop.set()
        writer.join()
        for folder in folders:
            folder.kill()
            folder.communicate()
    assert MetricsFold(ledger).catch_up()
    assert totals(ledger) == pytest.approx(expected(written, len(written) // 2))
    ledger.close()


def test_two_folds_at_once_in_threads(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for _ in range(300):
            write(ledger, *FACTS)
        others = [Ledger(tmp_path) for _ in range(4)]
        threads = [threading.Thread(target=MetricsFold(other, batch=11).catch_up) for other in others]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert totals(ledger) == pytest.approx(expected(FACTS * 300, 300))
        for other in others:
            other.close()


def test_one_call_has_an_end_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_fold, "BATCHES_AT_ONCE", 2)
    with Ledger(tmp_path) as ledger:
        fold = MetricsFold(ledger, batch=5)
        assert not fold.caught_up
        for _ in range(13):
            write(ledger, ("run_started", 1, {}))
        assert (fold.catch_up(), fold.caught_up) == (False, False)
        assert (fold.catch_up(), fold.caught_up) == (True, True)
        for _ in range(13):
            write(ledger, ("run_started", 1, {}))
        assert (fold.catch_up(), fold.caught_up) == (False, True), "once shown, the counters stay shown"
        assert fold.catch_up()
        assert counted(ledger, "flip_runs_started_total") == 26


def test_a_clock_that_jumps_back_changes_no_count(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        for at in (5_000.0, 10.0, 4_000.0, -3.0):
            write(ledger, ("run_started", 1, {}), at=at)
            assert MetricsFold(ledger).catch_up()
        assert counted(ledger, "flip_runs_started_total") == 4


# -- what is malformed -----------------------------------------------------------------------------------------------

POISON = {
    "no json": ("facts", "nonsense", 1),
    "a number": ("facts", "17", 1),
    "null": ("facts", "null", 1),
    "no text": ("facts", b"\xff\xfe\x00", 1),
    "empty": ("facts", "", 1),
    "nested without end": ("facts", "[" * 100_000, 1),
    "too short": ("facts", '[["run_started"]]', 1),
    "no list": ("facts", '[{"run_started": 1}, 3]', 2),
    "unknown fact": ("facts", '[["tea_drunk", 1, {}]]', 1),
    "fact is a list": ("facts", '[[["run_started"], 1, {}]]', 1),
    "not a number": ("facts", '[["run_started", NaN, {}]]', 1),
    "infinite": ("facts", '[["run_started", 1e999, {}]]', 1),
    "too great for a float": ("facts", f'[["run_started", 1{"0" * 400}, {{}}]]', 1),
    "absurd": ("facts", '[["run_started", 1e300, {}]]', 1),
    "negative": ("facts", '[["run_started", -1, {}]]', 1),
    "a word": ("facts", '[["run_started", "1", {}]]', 1),
    "true": ("facts", '[["run_started", true, {}]]', 1),
    "labels are no mapping": ("facts", '[["run_started", 1, []]]', 1),
    "good and bad": ("facts", '[["run_started", 1, {}], ["run_started", null, {}], ["run_started", 1, {}]]', 1),
    "name is no text": ("name", b"\xff", 0),
    "time is no number": ("time", "yesterday", 0),
    "run id is no text": ("run_id", b"\xff", 0),
}


@pytest.mark.parametrize("case", sorted(POISON))
def test_poison_is_skipped_counted_and_stops_nothing(
    case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    column, value, skipped = POISON[case]
    with Ledger(tmp_path) as ledger:
        for _ in range(3):
            write(ledger, ("run_started", 1, {}))
        with sqlite3.connect(tmp_path / FILE_NAME) as db:
            db.execute(f"UPDATE events SET {column} = ? WHERE id = 2", (value,))
        db.close()
        with caplog.at_level(logging.WARNING):
            assert MetricsFold(ledger).catch_up()
            assert MetricsFold(ledger).catch_up()
        good = {"good and bad": 4}.get(case, 3 if not skipped else 2)
        assert counted(ledger, "flip_runs_started_total") == good
        assert counted(ledger, "flip_observability_errors_total", "metrics") == skipped
        assert sum(total for (name, _), total in totals(ledger).items() if name == "flip_lifecycle_events_total") == 3
        # The ledger has things of its own to say, such as that a container's file system does not last.
        said = [record for record in caplog.records if record.name == _fold.__name__]
        assert len(said) == bool(skipped)


def test_labels_that_nobody_knows_have_a_place(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        write(ledger, ("upload_failure", 1, {"reason": "aliens"}), ("hub_request", 1, {}), name="_secret_event")
        write(ledger, ("observability_error", 2, {"component": "telepathy"}))
        assert MetricsFold(ledger).catch_up()
        assert counted(ledger, "flip_results_upload_failures_total", "other") == 1
        assert counted(ledger, "flip_hub_requests_total", "other", "other") == 1
        assert counted(ledger, "flip_lifecycle_events_total", "other") == 1
        assert counted(ledger, "flip_observability_errors_total", "telepathy") == 2


# -- limits ----------------------------------------------------------------------------------------------------------


def test_client_names_without_end_find_an_end(tmp_path: Path) -> None:
    tasks = BY_NAME["flip_client_task_duration_seconds"]
    with Ledger(tmp_path) as ledger:
        for start in range(0, 5_000, 50):
            names = range(start, start + 50)
            write(ledger, *(("client_task_duration", 1, {"client": f"c{i}", "task": "train"}) for i in names))
        assert MetricsFold(ledger, batch=9).catch_up()
        found = load_series(ledger.metric_state())[tasks.name]
        assert len(found) == 201
        assert found["c0", "train"].total == 1
        assert found["other", "train"].total == 4_800
        write(ledger, ("client_task_duration", 1, {"client": "c7", "task": "train"}))
        assert MetricsFold(ledger).catch_up()
        assert load_series(ledger.metric_state())[tasks.name]["c7", "train"].total == 2


def test_tasks_and_their_combinations_find_an_end(tmp_path: Path) -> None:
    metric = BY_NAME["flip_client_task_duration_seconds"]
    with Ledger(tmp_path) as ledger:
        pairs = [(client, task) for client in range(250) for task in range(30)]
        for start in range(0, len(pairs), 100):
            some = pairs[start : start + 100]
            facts = (("client_task_duration", 1, {"client": f"c{c}", "task": f"t{t}"}) for c, t in some)
            write(ledger, *facts)
        assert MetricsFold(ledger, batch=20).catch_up()
        found = load_series(ledger.metric_state())[metric.name]
        assert len(found) <= metric.max_series + 11
        assert len({task for _, task in found}) == 11
        assert sum(series.total for series in found.values()) == len(pairs)


def test_components_find_an_end(tmp_path: Path) -> None:
    with Ledger(tmp_path) as ledger:
        write(ledger, *(("observability_error", 1, {"component": f"x{i}"}) for i in range(100)))
        write(ledger, ("observability_error", 1, {"component": "sentinel"}))
        assert MetricsFold(ledger).catch_up()
        found = load_series(ledger.metric_state())["flip_observability_errors_total"]
        assert len(found) <= 42
        assert found["sentinel",].total == 1
        assert sum(series.total for series in found.values()) == 101


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("site-1", "site-1"),
        ("", "unknown"),
        ("   ", "unknown"),
        ("a\nb\tc", "a_b_c"),
        ('quo"te\\', 'quo"te\\'),
        ("Zürich 東京 🏥", "Zürich 東京 🏥"),
        ("\ud800lone", "_lone"),
        ("right\u202eleft\u2028", "right_left_"),
        (None, "unknown"),
        ([1], "unknown"),
        (7, "7"),
    ],
    ids=lambda value: repr(value).encode("ascii", "backslashreplace").decode(),
)
def test_a_client_name_is_one_printable_line(name: object, shown: str) -> None:
    metric = BY_NAME["flip_client_task_duration_seconds"]
    assert metric.label_values({"client": name, "task": "train", "surplus": "x"}) == (shown, "train")


def test_long_names_are_short_and_stay_apart() -> None:
    metric = BY_NAME["flip_client_task_duration_seconds"]
    one, other = (metric.label_values({"client": "x" * 10_000 + end})[0] for end in "ab")
    assert len(one) == len(other) == 96
    assert one != other


# -- state that another version wrote --------------------------------------------------------------------------------


def stored(metric: Metric, labels: object, value: object) -> tuple[str, str, str]:
    return metric.name, json.dumps(labels), value if isinstance(value, str) else json.dumps(value)


ROUNDS = BY_NAME["flip_round_duration_seconds"]
FINISHED = BY_NAME["flip_runs_finished_total"]


def test_other_buckets_keep_number_and_sum() -> None:
    old = Series((2.0, 20.0, 1e6))
    for value in (1, 1.5, 10, 100, 2e6):
        old.add(value, _fold.Exemplar("t", value, 1.0))
    new = load_series([stored(ROUNDS, {}, old.to_json())])[ROUNDS.name][()]
    assert new.bounds == ROUNDS.buckets
    assert new.total == old.total
    by_bound = {bound: count for bound, count in zip((*new.bounds, None), new.counts, strict=True) if count}
    assert by_bound == {5.0: 2, 30.0: 1, None: 2}
    assert {exemplar.value for exemplar in new.exemplars.values()} == {1.5, 10, 100, 2e6}


@given(
    st.lists(st.floats(0, 1e9), max_size=30),
    st.lists(st.floats(0, 1e9), unique=True, max_size=8),
    st.lists(st.floats(0, 1e9), unique=True, max_size=8),
)
def test_rebucketing_never_loses_and_never_makes_faster(
    values: list[float], old: list[float], new: list[float]
) -> None:
    before, fresh = Series(tuple(sorted(old))), Series(tuple(sorted(new)))
    for value in values:
        before.add(value, None)
        fresh.add(value, None)
    after = before.rebucketed(fresh.bounds)
    assert (after.total, sum(after.counts)) == (before.total, len(values))
    for slot in range(len(after.counts)):
        assert sum(after.counts[: slot + 1]) <= sum(fresh.counts[: slot + 1])
    assert Series.from_json(after.to_json()) == after


def test_what_is_new_is_added_to_what_another_version_left(tmp_path: Path) -> None:
    old = Series((2.0, 20.0))
    old.add(10, None)
    rows = [
        stored(ROUNDS, {}, old.to_json()),
        stored(FINISHED, {}, {"total": 5, "counts": [5], "bounds": [], "exemplars": {}}),
        stored(FINISHED, {"status": "ERROR", "job": "x"}, {"total": 2, "counts": [2], "bounds": [], "exemplars": {}}),
        ("flip_retired_total", "{}", '{"total": 9, "counts": [9], "bounds": [], "exemplars": {}}'),
    ]
    with Ledger(tmp_path) as ledger:
        assert ledger.fold_metrics(0, 0, [], lambda _: rows)
        write(ledger, ("round_duration", 1, {}), ("run_finished", 1, {"status": "ERROR"}))
        assert MetricsFold(ledger).catch_up()
        state = load_series(ledger.metric_state())
        assert (state[ROUNDS.name][()].total, sum(state[ROUNDS.name][()].counts)) == (11, 2)
        assert counted(ledger, FINISHED.name, "ERROR") == 3
        assert counted(ledger, FINISHED.name, "other") == 5
        assert "flip_retired_total" not in state
        assert "flip_retired_total" in {name for name, _, _ in ledger.metric_state()}, "a downgrade finds it again"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "nonsense",
        "[]",
        "{}",
        '{"total": 1}',
        '{"total": "x", "counts": [1], "bounds": [], "exemplars": {}}',
        '{"total": NaN, "counts": [1], "bounds": [], "exemplars": {}}',
        '{"total": 1, "counts": [1, 2], "bounds": [], "exemplars": {}}',
        '{"total": 1, "counts": [1, 2, 3], "bounds": [5, 3], "exemplars": {}}',
        '{"total": 1, "counts": [-1], "bounds": [], "exemplars": {}}',
        '{"total": 1, "counts": [1], "bounds": [], "exemplars": {"0": 3}}',
    ],
    ids=range(11),
)
def test_a_damaged_row_starts_anew_and_harms_no_other(
    value: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = json.dumps({"status": "ERROR"})
    with Ledger(tmp_path) as ledger:
        write(ledger, ("run_finished", 1, {"status": "ERROR"}), ("run_finished", 1, {"status": "STOPPED"}))
        assert MetricsFold(ledger).catch_up()
        ledger.fold_metrics(1, 1, [], lambda _: [(FINISHED.name, key, value), ("flip_fatal_errors_total", value, "{")])
        with caplog.at_level(logging.WARNING):
            assert counted(ledger, FINISHED.name, "STOPPED") == 1
        assert "damaged" in caplog.text
        write(ledger, ("run_finished", 1, {"status": "ERROR"}), ("fatal_error", 1, {}))
        assert MetricsFold(ledger).catch_up()
        assert counted(ledger, FINISHED.name, "ERROR") == 1
        assert counted(ledger, "flip_fatal_errors_total") == 1


def test_known_series_are_there_from_the_start() -> None:
    found = series_of({}, BY_NAME["flip_hub_requests_total"])
    assert len(found) == 16
    assert all(series.total == 0 for _, series in found)
    assert series_of({}, BY_NAME["flip_client_task_duration_seconds"]) == []


# -- a ledger that goes away -----------------------------------------------------------------------------------------


def _delete(directory: Path) -> None:
    for path in directory.glob(f"{FILE_NAME}*"):
        path.unlink()


def _replace(directory: Path) -> None:
    _delete(directory)
    Ledger(directory).close()


def _truncate(directory: Path) -> None:
    os.truncate(directory / FILE_NAME, 0)


def _garble(directory: Path) -> None:
    with (directory / FILE_NAME).open("r+b") as file:
        file.write(b"this is no database. " * 4_000)


@pytest.mark.parametrize("harm", [_delete, _replace, _truncate, _garble], ids=lambda harm: harm.__name__)
def test_a_ledger_that_is_taken_away_under_a_fold(
    harm: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = Ledger(tmp_path)
    fold = MetricsFold(held)
    write(held, ("run_started", 1, {}))
    assert fold.catch_up()
    held.checkpoint()
    harm(tmp_path)
    for _ in range(3):
        with contextlib.suppress(LedgerError):
            assert fold.catch_up()
    with Ledger.open_or_replace(tmp_path) as fresh:
        before = counted(fresh, "flip_runs_started_total")
        write(fresh, ("run_started", 1, {}))
        assert fold.catch_up()
        assert counted(fresh, "flip_runs_started_total") == before + 1
    if harm is not _garble:
        assert "counters restart" in caplog.text
    held.close()
