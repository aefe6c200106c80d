"""The lifecycle, folded: what must hold for any order, repetition or omission of events."""

from __future__ import annotations

import threading
from collections import Counter
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.event_type import EventType
from nvflare.app_common.app_event_type import AppEventType

from flip_observability import lifecycle
from flip_observability.constants import FINAL_STATUSES, FlareEvents, FlipEvents, ModelStatus, OwnEvents
from flip_observability.lifecycle import TABLE, Effects, Ending, Event, RunState, UploadOutcome, decide_ending, fold

RUN_ID = "3f0c1a52-6f6f-4a39-8d0a-1f6d6f6a2b11"
RANKS = {"INITIATED": 1, "PREPARED": 2, "TRAINING_STARTED": 3} | dict.fromkeys(map(str, FINAL_STATUSES), 4)


def _attrs(name: str) -> st.SearchStrategy[dict[str, lifecycle.Scalar]]:
    text = st.sampled_from(["a", "b", "c"])
    return st.fixed_dictionaries(
        {},
        optional={
            "workflow": text,
            "client": text,
            "task_id": text,
            "task": st.just("train"),
            "round": st.integers(1, 4),
            "total_rounds": st.just(4),
            "return_code": st.sampled_from(["OK", "EXECUTION_EXCEPTION"]),
            "aborted": st.booleans(),
            "accepted": st.booleans(),
            "relay": st.booleans(),
            "bytes": st.integers(0, 9),
            "status": st.sampled_from([*map(str, ModelStatus), "NONSENSE", ""]),
        },
    )


EVENTS = st.lists(
    st.sampled_from([*sorted(TABLE), "_unknown"]).flatmap(
        lambda name: st.builds(
            Event, st.just(name), st.floats(1_000, 2_000, allow_nan=False), _attrs(name), st.uuids().map(str)
        )
    ),
    max_size=60,
)


def _ended(events: list[Event]) -> list[Event]:
    """The same events, and after them the end that a run always has."""
    last = [Event(FlareEvents.ABOUT_TO_END_RUN, 3_000), Event(FlareEvents.END_RUN, 3_001, {"status": "ERROR"})]
    return events + last


def _run(events: list[Event]) -> tuple[RunState, list[Effects]]:
    state = RunState(RUN_ID)
    return state, [state.apply(event) for event in events]


@given(EVENTS)
def test_status_never_goes_backwards_and_one_final_value_exists(events: list[Event]) -> None:
    state, effects = _run(_ended(events))
    sent = [e.status for e in effects if e.status is not None]
    ranks = [RANKS[str(status).replace("RUNNING", "TRAINING_STARTED")] for status in sent]
    assert ranks == sorted(set(ranks))
    finals = [e.status for e in effects if e.final]
    assert len(finals) == 1
    assert finals[0] == state.final_status
    assert all(not e.final or e.status in FINAL_STATUSES for e in effects)


@given(EVENTS)
def test_every_opened_span_is_closed_once_and_lies_within_its_parent(events: list[Event]) -> None:
    state, effects = _run(_ended(events))
    spans = [span for e in effects for span in e.spans]
    assert state.open_spans == ()
    assert max(Counter(span.span_id for span in spans).values()) == 1
    roots = [span for span in spans if span.name == lifecycle.RUN]
    assert len(roots) == 1
    assert roots[0].parent_id is None
    by_id = {span.span_id: span for span in spans}
    for span in spans:
        assert span.start <= span.end
        assert all(span.start <= when <= span.end for _, when, _ in span.events)
        if span.parent_id is not None:
            parent = by_id[span.parent_id]
            assert parent.start <= span.start
            assert span.end <= parent.end


@given(EVENTS, st.integers(0, 60))
def test_folding_in_pieces_equals_folding_at_once(events: list[Event], cut: int) -> None:
    whole, all_effects = _run(_ended(events))
    state = fold(RUN_ID, _ended(events)[:cut])
    rest = [state.apply(event) for event in _ended(events)[cut:]]
    assert state.columns() == whole.columns()
    assert state.problems == whole.problems
    assert rest == all_effects[cut:]


@given(EVENTS)
def test_a_run_is_counted_once(events: list[Event]) -> None:
    _, effects = _run([*_ended(events), *_ended(events)])
    facts = Counter(name for e in effects for name, _, _ in e.facts)
    assert facts["run_finished"] == 1
    for name in ("run_started", "fatal_error", "abort", "orphaned", "upload_failure"):
        assert facts[name] <= 1


@given(EVENTS)
def test_nothing_changes_after_the_end(events: list[Event]) -> None:
    state, _ = _run(_ended(events))
    before = state.columns()
    for event in events:
        assert state.apply(event) == Effects()
    assert state.columns() == before


@settings(max_examples=15)
@given(EVENTS)
def test_any_interleaving_of_threads_keeps_the_rules(events: list[Event]) -> None:
    # The recorder folds under a lock: what threads can change is the order, and all orders must be fine.
    state, lock, sent = RunState(RUN_ID), threading.Lock(), list[ModelStatus]()

    def work(mine: list[Event]) -> None:
        for event in mine:
            with lock:
                status = state.apply(event).status
                if status is not None:
                    sent.append(status)

    threads = [threading.Thread(target=work, args=(_ended(events)[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ranks = [RANKS[str(status).replace("RUNNING", "TRAINING_STARTED")] for status in sent]
    assert ranks == sorted(set(ranks))


EXPECTED_ENDINGS = [
    # fatal, aborted, all tasks failed: what wins whatever the upload did
    ({"fatal": True}, Ending.ERROR),
    ({"aborted": True}, Ending.ABORT_UNRESOLVED),
    ({"all_tasks_failed": True}, Ending.ERROR),
]


@pytest.mark.parametrize(("fatal", "aborted", "failed", "outcome"), list(product(*[[True, False]] * 3, UploadOutcome)))
def test_precedence_of_rule_3(fatal: bool, aborted: bool, failed: bool, outcome: UploadOutcome) -> None:
    given_ = {"fatal": fatal, "aborted": aborted, "all_tasks_failed": failed}
    by_outcome = {
        UploadOutcome.PENDING: Ending.UPLOAD_PENDING,
        UploadOutcome.UPLOADED: Ending.RESULTS_UPLOADED,
        UploadOutcome.UPLOAD_FAILED: Ending.UPLOAD_FAILED,
        UploadOutcome.FAILED: Ending.ERROR,
    }
    expected = next(
        (ending for want, ending in EXPECTED_ENDINGS if want.items() <= given_.items()), by_outcome[outcome]
    )
    assert decide_ending(fatal=fatal, aborted=aborted, all_tasks_failed=failed, outcome=outcome) is expected


def test_events_are_spelled_as_nvflare_spells_them() -> None:
    for event in FlareEvents:
        spelled = getattr(EventType, event.name, None) or getattr(AppEventType, event.name)
        assert event.value == spelled


def test_fedavg_records_prepared_but_does_not_send_it_after_training_started() -> None:
    _, effects = _run(
        [
            Event(FlareEvents.START_RUN, 1),
            Event(FlareEvents.START_WORKFLOW, 2, {"workflow": "fedavg"}),
            Event(FlareEvents.TRAINING_STARTED, 3, {"workflow": "fedavg"}),
            Event(FlareEvents.INITIAL_MODEL_LOADED, 4, {"workflow": "fedavg"}),
        ]
    )
    assert [e.status for e in effects] == [None, None, ModelStatus.TRAINING_STARTED, None]
    assert [span.name for span in effects[-1].spans] == ["flip.initial_model_loaded"]


def test_end_run_in_mid_run_is_a_fatal_error_and_not_the_end() -> None:
    state, effects = _run([Event(FlareEvents.START_RUN, 1), Event(FlareEvents.END_RUN, 2, {"status": "ERROR"})])
    assert state.fatal
    assert not state.ended
    assert state.final_status is None
    assert ("fatal_error", 1, {}) in effects[-1].facts


def test_an_end_without_a_status_leaves_the_run_to_whoever_can_judge_it() -> None:
    events = [
        Event(FlareEvents.START_RUN, 0),
        Event(FlareEvents.ROUND_STARTED, 1),
        Event(FlareEvents.ABOUT_TO_END_RUN, 2, {"aborted": True}),
        Event(FlareEvents.END_RUN, 3),
    ]
    state = fold(RUN_ID, events)
    assert state.open_spans == (lifecycle.RUN,)
    effects = state.apply(Event(OwnEvents.FINAL_STATUS, 9, {"status": "STOPPED"}))
    assert effects.status is ModelStatus.STOPPED
    assert [span.name for span in effects.spans] == [lifecycle.RUN]


def test_a_round_ends_with_the_next_and_with_its_workflow() -> None:
    events = [
        Event(FlareEvents.START_RUN, 0),
        Event(FlareEvents.START_WORKFLOW, 1, {"workflow": "one"}),
        Event(FlareEvents.ROUND_STARTED, 2, {"workflow": "one", "round": 1, "total_rounds": 2}),
        Event(FlareEvents.ROUND_STARTED, 5, {"workflow": "one", "round": 2}),
        Event(FlareEvents.END_WORKFLOW, 9, {"workflow": "one"}),
        # The second workflow's prop is there before it starts, and its rounds begin at 1 again.
        Event(FlareEvents.INITIAL_MODEL_LOADED, 10, {"workflow": "two"}),
        Event(FlareEvents.START_WORKFLOW, 11, {"workflow": "two"}),
        Event(FlareEvents.ROUND_STARTED, 12, {"workflow": "two", "round": 1}),
    ]
    _, effects = _run(_ended(events))
    spans = [span for e in effects for span in e.spans]
    rounds = [(s.attributes["flip.round"], s.start, s.end) for s in spans if s.name == lifecycle.ROUND]
    assert rounds == [(1, 2, 5), (2, 5, 9), (1, 12, 3_001)]
    assert [s.attributes["flip.workflow"] for s in spans if s.name == lifecycle.WORKFLOW] == ["one", "two"]
    assert [s.attributes.get("flip.total_rounds") for s in spans if s.name == lifecycle.ROUND] == [2, 2, None]


def test_client_task_time_is_from_assignment_to_return_even_when_the_round_is_over() -> None:
    task = {"client": "site-1", "task": "train", "task_id": "t1"}
    events = [
        Event(FlareEvents.START_RUN, 0),
        Event(FlareEvents.ROUND_STARTED, 1, {"round": 1}),
        Event(FlareEvents.AFTER_TASK_DATA_FILTER, 2, task),
        Event(FlareEvents.ROUND_STARTED, 5, {"round": 2}),
        Event(FlareEvents.BEFORE_PROCESS_SUBMISSION, 9, task | {"return_code": "OK"}),
    ]
    _, effects = _run(events)
    assert ("client_task_duration", 7, {"client": "site-1", "task": "train"}) in effects[-1].facts
    clipped = [span for span in effects[3].spans if span.name == lifecycle.CLIENT_TASK]
    assert [(span.start, span.end) for span in clipped] == [(2, 5)]


def test_an_abort_that_follows_a_fatal_error_is_no_abort() -> None:
    state = fold(RUN_ID, [Event(FlareEvents.FATAL_SYSTEM_ERROR, 1), Event(FlipEvents.ABORTED, 2)])
    assert state.fatal
    assert not state.aborted


def test_only_a_stopped_run_counts_as_aborted() -> None:
    start = [Event(FlareEvents.START_RUN, 0), Event(FlareEvents.ABOUT_TO_END_RUN, 1, {"aborted": True})]
    _, stopped = _run([*start, Event(FlareEvents.END_RUN, 2, {"status": "STOPPED"})])
    _, error = _run([*start, Event(OwnEvents.FINAL_STATUS, 2, {"status": "ERROR"})])
    assert ("abort", 1, {}) in stopped[-1].facts
    assert ("abort", 1, {}) not in error[-1].facts


def test_open_tasks_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "MAX_OPEN_TASKS", 80)
    state = RunState(RUN_ID)
    for number in range(500):
        state.apply(Event(FlareEvents.AFTER_TASK_DATA_FILTER, number, {"client": "c", "task_id": str(number)}))
    assert len(state.open_spans) <= 82
    assert len(state._late) <= 80


def test_round_events_for_the_hub_only_when_asked_to_relay() -> None:
    events = [
        Event(FlareEvents.START_RUN, 0),
        Event(FlareEvents.ROUND_STARTED, 1, {"round": 1, "total_rounds": 3, "relay": True}),
        Event(FlareEvents.AFTER_TASK_DATA_FILTER, 2, {"client": "site-1", "task_id": "t", "relay": True}),
        Event(FlareEvents.AFTER_CONTRIBUTION_ACCEPT, 3, {"client": "site-1", "size_bytes": 8, "relay": True}),
        Event(FlareEvents.ROUND_DONE, 4, {"relay": True}),
    ]
    _, effects = _run(events)
    sent = [(h.event_type, h.round, dict(h.details), h.client) for e in effects for h in e.hub_events]
    assert sent == [
        ("ROUND_STARTED", 1, {"total_rounds": 3}, None),
        ("CLIENT_RESULT_RECEIVED", 1, {"size_bytes": 8}, "site-1"),
        ("ROUND_AGGREGATED", 1, {"returned": 1, "expected": 1}, None),
    ]
    silent = [Event(e.name, e.time, {k: v for k, v in e.attrs.items() if k != "relay"}) for e in events]
    assert [h for e in _run(silent)[1] for h in e.hub_events] == []


def test_a_round_tells_what_flips_controller_counted_and_only_its_own_end_says_aggregated() -> None:
    def aggregated(*events: Event) -> list[dict[str, Any]]:
        start = Event(FlareEvents.ROUND_STARTED, 1, {"round": 1, "relay": True, "expected": 3})
        _, effects = _run([Event(FlareEvents.START_RUN, 0), start, *events])
        return [dict(h.details) for e in effects for h in e.hub_events if h.event_type == "ROUND_AGGREGATED"]

    counted = Event(FlareEvents.ROUND_DONE, 2, {"relay": True, "returned": 2, "expected": 2})
    assert aggregated(counted) == [{"returned": 2, "expected": 2}]
    assert aggregated(Event(FlareEvents.ROUND_DONE, 2, {"relay": True})) == [{"returned": 0, "expected": 3}]
    assert aggregated(Event(FlareEvents.ABOUT_TO_END_RUN, 2), Event(FlareEvents.END_RUN, 3, {"status": "ERROR"})) == []
