"""The two files of metrics that go with a run's results."""

from __future__ import annotations

import json
import logging
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nvflare.apis.dxo import DXO, DataKind
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.app_event_type import AppEventType

from flare_run import Run, metrics
from flip_observability.nvflare.components import EvaluationJsonGenerator, ValidationJsonGenerator

RECEIVED = AppEventType.VALIDATION_RESULT_RECEIVED
Generator = ValidationJsonGenerator | EvaluationJsonGenerator


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture(params=[ValidationJsonGenerator, EvaluationJsonGenerator])
def generator(request: pytest.FixtureRequest) -> Generator:
    made: Generator = request.param()
    return made


def kept(generator: Generator) -> dict[str, Any]:
    return generator._val_results if isinstance(generator, ValidationJsonGenerator) else generator._eval_results


def written(run: Run, generator: Generator) -> Any:
    generator.handle_evaluation_events(EventType.END_RUN, run.context())
    return json.loads((run.dir / generator._results_dir / generator._json_file_name).read_text())


def test_a_validation_is_written_by_client_and_owner(run: Run) -> None:
    generator = ValidationJsonGenerator()
    generator.handle_evaluation_events(EventType.START_RUN, run.context())
    generator.handle_evaluation_events(RECEIVED, run.result("site-1", metrics(acc=0.5), "site-2"))
    generator.handle_evaluation_events(RECEIVED, run.result("site-1", metrics(acc=0.75), "SRV_server"))
    generator.handle_evaluation_events(RECEIVED, run.result("site-2", metrics(acc=1), "site-2"))
    expected = {"site-1": {"site-2": {"acc": 0.5}, "SRV_server": {"acc": 0.75}}, "site-2": {"site-2": {"acc": 1}}}
    assert generator._val_results == expected
    assert written(run, generator) == expected
    assert (run.dir / "cross_site_val" / "cross_val_results.json").is_file()


def test_a_collection_is_written_by_the_sites_in_it(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    generator = ValidationJsonGenerator()
    parts = {
        "a": DXO(DataKind.METRICS, data={"acc": 0.5}),
        "b": DXO(DataKind.COLLECTION, data={"c": DXO(DataKind.METRICS, data={"acc": 1})}),
        "weights": DXO(DataKind.WEIGHTS, data={"w": 1}),
        "patient 4711": {"acc": 1},
    }
    reply = DXO(DataKind.COLLECTION, data=parts).to_shareable()
    generator.handle_evaluation_events(RECEIVED, run.result("relay", reply, "SRV_server"))
    assert written(run, generator) == {
        "relay.a": {"SRV_server": {"acc": 0.5}},
        "relay.b.c": {"SRV_server": {"acc": 1}},
    }
    assert "Expected dxo of kind METRICS but got WEIGHTS" in caplog.text
    assert "1 parts of a collection cannot be read" in caplog.text
    assert "4711" not in caplog.text


def test_an_evaluation_is_written_by_client(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    generator.handle_evaluation_events(RECEIVED, run.result("site-1", metrics(acc=0.5)))
    generator.handle_evaluation_events(RECEIVED, run.result("site-1", metrics(acc=0.75)))
    generator.handle_evaluation_events(RECEIVED, run.result("site-2", metrics(dice=1)))
    expected = {"site-1": {"acc": 0.75}, "site-2": {"dice": 1}}
    assert generator._eval_results == expected
    assert written(run, generator) == expected
    assert (run.dir / "evaluation_results" / "evaluation_results.json").is_file()


def test_a_new_run_forgets_the_results_of_the_last(run: Run, generator: Generator) -> None:
    generator.handle_evaluation_events(RECEIVED, run.result("site-1", metrics(acc=0.5), "site-2"))
    generator.handle_evaluation_events(EventType.START_RUN, run.context())
    assert kept(generator) == {}
    assert written(run, generator) == {}


def test_folder_and_name_can_be_chosen(run: Run) -> None:
    generator = EvaluationJsonGenerator("a/b", "c.json")
    assert (generator._results_dir, generator._json_file_name) == ("a/b", "c.json")
    assert written(run, generator) == {}
    assert sorted(path.name for path in (run.dir / "a" / "b").iterdir()) == ["c.json", "evaluation_failures.json"]


WEIGHTS = DXO(data_kind=DataKind.WEIGHTS, data={"w": 1}).to_shareable()
BAD_RESULTS = {
    "no client": (None, metrics(acc=1), "data_client unknown"),
    "empty client": ("", metrics(acc=1), "data_client unknown"),
    "no result": ("site-1", None, "Validation result not found"),
    "an empty result": ("site-1", {}, "Validation result not found"),
    "an empty shareable": ("site-1", Shareable(), "Exception in handling validation result"),
    "another kind": ("site-1", WEIGHTS, "Expected dxo of kind METRICS but got WEIGHTS"),
    "a failure": ("site-1", make_reply(ReturnCode.EXECUTION_EXCEPTION), "Exception in handling validation result"),
    "no shareable": ("site-1", "patient 4711", "Exception in handling validation result"),
}


@pytest.mark.parametrize("case", BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_what_is_no_result_is_logged_and_not_kept(
    run: Run, generator: Generator, case: tuple[Any, Any, str], caplog: pytest.LogCaptureFixture
) -> None:
    client, result, message = case
    with caplog.at_level(logging.ERROR):
        generator.handle_evaluation_events(RECEIVED, run.result(client, result, "site-2"))
    if isinstance(generator, EvaluationJsonGenerator) and result is BAD_RESULTS["a failure"][1]:
        message = "return_code=EXECUTION_EXCEPTION"
    assert message in caplog.text
    assert "4711" not in caplog.text
    assert kept(generator) == {}
    assert run.recorder.events == []  # no log event: it would come back to every component


def test_what_a_client_names_cannot_break_a_line_of_the_log(
    run: Run, generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    evil = "evil\n2030-01-01 - ERROR - all is lost \x1b[2J\x9b" + "x" * 10_000
    odd, failed = metrics(acc=1), make_reply(ReturnCode.EXECUTION_EXCEPTION)
    odd["DXO"]["kind"] = evil
    failed.set_return_code(evil)
    with caplog.at_level(logging.WARNING):
        for result in (odd, failed, metrics(**{evil: float("nan")})):
            generator.handle_evaluation_events(RECEIVED, run.result(evil, result, "site-2"))
        if isinstance(generator, EvaluationJsonGenerator):
            generator.hub_metrics()
    assert any("evil" in message for message in caplog.messages)
    assert all("\x1b" not in message and "\n2030" not in message for message in caplog.messages), caplog.messages
    assert all(len(message) < 1_500 for message in caplog.messages)


def test_a_validation_without_an_owner_is_not_kept(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    generator = ValidationJsonGenerator()
    generator.handle_evaluation_events(RECEIVED, run.result("site-1", metrics(acc=1)))
    assert "model_owner unknown" in caplog.text
    assert generator._val_results == {}


def test_other_events_and_the_components_own_do_nothing(run: Run, generator: Generator) -> None:
    generator.handle_event(RECEIVED, run.result("site-1", metrics(acc=1), "site-2"))
    generator.handle_evaluation_events("_something_else", run.result("site-1", metrics(acc=1), "site-2"))
    assert kept(generator) == {}


class Explosive:
    shape = ()

    def item(self) -> None:
        raise RuntimeError


def test_what_json_has_no_form_for_is_named_by_its_type(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    endless: list[Any] = []
    endless.append(endless)
    values = {
        "float32": np.float32(0.5),
        "int64": np.int64(3),
        "bool": np.bool_(True),
        "array0": np.array(2.0),
        "per_class": (0.1, np.float64(0.2), None),
        "by_class": {1: 0.5, np.int64(2): 0.25, None: 0, ("a", "b"): 1},
        "image": np.zeros((2, 2)),
        "bytes": b"x",
        "explosive": Explosive(),
        "complex": np.complex64(1),
        "unicode": "Größe \ud800",
        "endless": endless,
    }
    generator.handle_evaluation_events(RECEIVED, run.result("site-1", metrics(**values)))
    found = written(run, generator)["site-1"]
    assert found["float32"] == 0.5
    assert found["int64"] == 3
    assert found["bool"] is True
    assert found["array0"] == 2.0
    assert found["per_class"] == [0.1, 0.2, None]
    assert found["by_class"] == {"1": 0.5, "2": 0.25, "null": 0, "<class 'tuple'>": 1}
    assert found["image"] == "<class 'numpy.ndarray'>"
    assert found["bytes"] == "<class 'bytes'>"
    assert "Explosive" in found["explosive"]
    assert found["complex"] == "<class 'numpy.complex64'>"
    assert found["unicode"] == values["unicode"]
    assert "<class 'list'>" in json.dumps(found["endless"])


def test_a_context_without_engine_is_logged_and_nothing_is_written(
    generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    for event in (EventType.START_RUN, RECEIVED, EventType.END_RUN):
        generator.handle_evaluation_events(event, FLContext())
    assert "Engine not found" in caplog.text


@pytest.mark.parametrize("folder", ["../outside", "/outside"])
def test_nothing_is_written_outside_the_run_directory(run: Run, folder: str) -> None:
    generator = ValidationJsonGenerator(results_dir=folder)
    with pytest.raises(ValueError, match="results path"):
        generator.handle_evaluation_events(EventType.END_RUN, run.context())
    assert not (run.root / "outside").exists()


def test_a_link_out_of_the_run_directory_is_not_followed(run: Run, generator: Generator) -> None:
    (run.root / "outside").mkdir()
    (run.dir / generator._results_dir).symlink_to(run.root / "outside")
    with pytest.raises(ValueError, match="results path"):
        generator.handle_evaluation_events(EventType.END_RUN, run.context())
    assert list((run.root / "outside").iterdir()) == []


def test_the_file_is_replaced_whole_and_no_temporary_one_stays(run: Run, generator: Generator) -> None:
    generator.handle_evaluation_events(RECEIVED, run.result("site-1", metrics(acc=0.5), "site-2"))
    first = written(run, generator)
    path = run.dir / generator._results_dir / generator._json_file_name
    with path.open() as before:
        generator.handle_evaluation_events(RECEIVED, run.result("site-2", metrics(acc=1), "site-2"))
        assert written(run, generator) != first
        assert json.load(before) == first  # whoever read it meanwhile has the old one, whole
    assert {file.name for file in path.parent.iterdir()} <= {path.name, "evaluation_failures.json"}


def test_a_write_that_fails_leaves_no_temporary_file(run: Run, generator: Generator) -> None:
    (run.dir / generator._results_dir / generator._json_file_name).mkdir(parents=True)
    with pytest.raises(OSError):
        generator.handle_evaluation_events(EventType.END_RUN, run.context())
    assert [path.name for path in (run.dir / generator._results_dir).iterdir()] == [generator._json_file_name]


def test_results_come_from_several_threads_while_it_is_written(run: Run, generator: Generator) -> None:
    failures: list[BaseException] = []

    def site(number: int) -> None:
        try:
            for model in range(50):
                result = run.result(f"site-{number}-{model}", metrics(acc=model), "server")
                generator.handle_evaluation_events(RECEIVED, result)
                if model % 10 == 0:
                    generator.handle_evaluation_events(EventType.END_RUN, run.context())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=site, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(written(run, generator)) == 8 * 50


# -- whether all tasks failed ------------------------------------------------------------------------------------------


def assigned(generator: EvaluationJsonGenerator, run: Run, client: str) -> None:
    fl_ctx = run.context(**{FLContextKey.TASK_NAME: "evaluate", FLContextKey.TASK_ID: client})
    generator.handle_evaluation_events(EventType.AFTER_TASK_DATA_FILTER, fl_ctx)


def returned(generator: EvaluationJsonGenerator, run: Run, result: Any) -> None:
    fl_ctx = run.context(**{FLContextKey.TASK_NAME: "evaluate", FLContextKey.TASK_RESULT: result})
    generator.handle_evaluation_events(EventType.BEFORE_PROCESS_SUBMISSION, fl_ctx)


def received(generator: EvaluationJsonGenerator, run: Run, result: Any, client: str = "site-1") -> None:
    generator.handle_evaluation_events(RECEIVED, run.result(client, result))


FAILED = make_reply(ReturnCode.EXECUTION_EXCEPTION)


def test_without_tasks_nothing_failed(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    generator.handle_evaluation_events(EventType.START_RUN, run.context())
    assert generator.all_tasks_failed() is False


def test_tasks_that_never_came_back_have_failed(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    assigned(generator, run, "site-1")
    assert generator.all_tasks_failed() is True


@pytest.mark.parametrize("result", [FAILED, make_reply(ReturnCode.TASK_UNKNOWN), "no shareable", None])
def test_tasks_that_all_came_back_as_failures(run: Run, result: Any) -> None:
    generator = EvaluationJsonGenerator()
    for client in ("site-1", "site-2"):
        assigned(generator, run, client)
        returned(generator, run, result)
    assert generator.all_tasks_failed() is True


def test_a_return_alone_is_proof_of_a_task(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    returned(generator, run, FAILED)
    assert generator.all_tasks_failed() is True


def test_one_success_among_failures_is_enough(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    for client, result in (("site-1", FAILED), ("site-2", metrics(acc=1))):
        assigned(generator, run, client)
        returned(generator, run, result)
        received(generator, run, result, client)
    assert generator.all_tasks_failed() is False


def test_tasks_that_are_no_evaluation_count_by_their_return_code(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    assigned(generator, run, "site-1")
    returned(generator, run, WEIGHTS)
    assert generator.all_tasks_failed() is False


def test_an_evaluation_that_returned_ok_and_brought_nothing_usable_has_failed(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    assigned(generator, run, "site-1")
    returned(generator, run, WEIGHTS)
    received(generator, run, WEIGHTS)
    assert generator.all_tasks_failed() is True


def test_a_new_run_forgets_the_failures_of_the_last(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    assigned(generator, run, "site-1")
    received(generator, run, FAILED)
    generator.handle_evaluation_events(EventType.START_RUN, run.context())
    assert generator.all_tasks_failed() is False


# -- several models, supplementary results, failures, and what the hub can plot ----------------------------------------


def evaluated(run: Run, client: str, model: str | None, data: dict[str, Any], **meta: Any) -> FLContext:
    return run.result(client, DXO(DataKind.METRICS, data=data, meta=meta).to_shareable(), model)


def test_an_evaluation_of_two_models_keeps_both(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    for client in ("site-1", "site-2"):
        for model, value in (("SRV_a", 0.5), ("SRV_b", 0.75)):
            generator.handle_evaluation_events(RECEIVED, evaluated(run, client, model, {"acc": value}))
    both = {"SRV_a": {"acc": 0.5}, "SRV_b": {"acc": 0.75}}
    assert written(run, generator) == {"site-1": both, "site-2": both}
    assert generator.hub_metrics() == {client: {"A/ACC": 0.5, "B/ACC": 0.75} for client in ("site-1", "site-2")}


def test_supplementary_results_are_for_the_file_only_and_metrics_win(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    more = {"acc": 9, "by_class": {"x": 9, "y": [1, 2]}, "note": "n"}
    fl_ctx = evaluated(run, "site-1", "SRV_a", {"acc": 0.5, "by_class": {"x": 1}}, flip_supplementary_results=more)
    generator.handle_evaluation_events(RECEIVED, fl_ctx)
    entry = {"acc": 0.5, "by_class": {"x": 1, "y": [1, 2]}, "note": "n"}
    assert written(run, generator) == {"site-1": {"SRV_a": entry}}
    assert generator.hub_metrics() == {"site-1": {"ACC": 0.5, "BY_CLASS/X": 1.0}}


def test_failed_tasks_are_written_and_the_file_is_there_without_any(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    path = run.dir / "evaluation_results" / "evaluation_failures.json"
    written(run, generator)
    assert json.loads(path.read_text()) == []
    generator.handle_evaluation_events(RECEIVED, run.result("site-1", FAILED, "SRV_a"))
    generator.handle_evaluation_events(RECEIVED, run.result("site-2", WEIGHTS))
    written(run, generator)
    failures = [
        {"model": "SRV_a", "client": "site-1", "return_code": ReturnCode.EXECUTION_EXCEPTION},
        {"model": None, "client": "site-2", "return_code": ReturnCode.EXECUTION_RESULT_ERROR},
    ]
    assert json.loads(path.read_text()) == generator._eval_failures == failures
    generator.handle_evaluation_events(EventType.START_RUN, run.context())
    assert (generator._eval_failures, generator.hub_metrics()) == ([], {})


def test_labels_have_their_model_where_one_of_two_failed_unless_the_reply_has_it(run: Run) -> None:
    generator = EvaluationJsonGenerator()
    generator.handle_evaluation_events(RECEIVED, evaluated(run, "site-1", "SRV_a", {"acc": 0.5}))
    generator.handle_evaluation_events(RECEIVED, evaluated(run, "site-2", "SRV_a", {"a": {"acc": 0.25}}))
    generator.handle_evaluation_events(RECEIVED, run.result("site-1", FAILED, "SRV_b"))
    assert generator.hub_metrics() == {"site-1": {"A/ACC": 0.5}, "site-2": {"A/ACC": 0.25}}


def test_what_the_hub_cannot_plot_is_left_out_and_said(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    generator = EvaluationJsonGenerator()
    data = {
        "acc": np.float32(0.5),
        "auc": float("nan"),
        "list": [1, 2],
        "yes": True,
        "text": "4711",
        "none": None,
        "n": 3,
    }
    generator.handle_evaluation_events(RECEIVED, evaluated(run, "site-1", None, data))
    with caplog.at_level(logging.WARNING):
        assert generator.hub_metrics() == {"site-1": {"ACC": 0.5, "N": 3.0}}
    assert "AUC" in caplog.text
    assert "4711" not in caplog.text
