"""FLIP's own job types, run whole by FLIP's own code: nobody who adopts loses anything, and a death is told.

Only ``make test-flip`` runs these: FLIP's environment has several gigabytes, and each run takes most of a minute.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from comparison import differences
from flip_runs import Flip, Site, begin, flip, observed, site, whole_run
from waiting import wait_for

__all__ = ["flip"]

pytestmark = [pytest.mark.flip, pytest.mark.nvflare_job]

MODEL = "FL_global_model.pt"
RUNS = [
    ("standard", ""),
    ("fed_opt", ""),
    ("diffusion", ""),
    ("diffusion_as_it_is", ""),
    ("evaluation", ""),
    ("evaluation", "site-2:second"),
    ("evaluation", "site-1:first site-1:second site-2:first site-2:second"),
]
"""Job types, and which evaluations fail."""
FINAL = {"diffusion_as_it_is": "ERROR"}


@pytest.mark.parametrize(("kind", "fails"), RUNS, ids=[f"{kind}-{len(fails.split())}-fail" for kind, fails in RUNS])
def test_hub_and_bucket_have_of_an_adopted_run_what_they_have_of_flips_own(
    flip: Flip, tmp_path: Path, kind: str, fails: str
) -> None:
    stock = whole_run(flip, kind, tmp_path / "stock", adopted=False, FLIP_TEST_FAILS=fails)
    adopted = whole_run(flip, kind, tmp_path / "adopted", adopted=True, FLIP_TEST_FAILS=fails)
    print(f"{kind}: FLIP's own {stock.seconds:.1f} s, adopted {adopted.seconds:.1f} s")
    found = differences(kind, stock, adopted)
    assert not found, "\n".join(found)
    wholly_failed = len(fails.split()) == 4
    assert adopted.statuses[-1] == ("ERROR" if wholly_failed else FINAL.get(kind, "RESULTS_UPLOADED"))
    refused = {f"{record.kind}: {record.problem}" for record in stock.records + adopted.records if record.problem}
    assert refused == set(), "the demo's hub would not have taken it"


@pytest.mark.parametrize("kind", ["standard", "diffusion", "evaluation"])
def test_a_run_that_is_killed_gets_its_final_status_and_keeps_its_model(flip: Flip, tmp_path: Path, kind: str) -> None:
    with site(flip, kind, adopted=True, folder=tmp_path / "run") as place:
        begin(place, lambda: _is_under_way(place), held=True)
        assert place.process is not None
        assert place.process.poll() is None, place.tail()
        place.kill()
        assert "ERROR" not in place.outcome().statuses
        with observed(place):
            wait_for(lambda: place.outcome().statuses[-1] == "ERROR", 60, "the final status")
            wait_for(place.bucket.objects, 60, "the results")
        left = place.outcome()
    assert left.statuses.count("ERROR") == 1
    assert (MODEL in left.members) == (kind != "evaluation")


def _is_under_way(place: Site) -> bool:
    """The first model is saved and the sites are in what comes after it; in an evaluation, the sites evaluate."""
    saved = place.workspace / "server" / "simulate_job" / "app_server" / "model" / MODEL
    started = "validate" if place.kind == "evaluation" else "train_dm" if place.kind == "diffusion" else "train"
    tasks = place.log.read_text(errors="replace").count(f"execute for task ({started})")
    return (place.kind == "evaluation" or saved.exists()) and tasks >= (4 if place.kind == "standard" else 2)


def test_a_hub_that_is_down_from_training_to_the_end_hears_of_it_afterwards(flip: Flip, tmp_path: Path) -> None:
    with site(flip, "standard", adopted=True, folder=tmp_path / "run") as place:
        begin(place, lambda: "RUNNING" in place.hub.statuses(place.model_id))
        place.hub.down()
        assert not place.wait(), place.tail()
        assert "RESULTS_UPLOADED" not in place.outcome().statuses
        assert MODEL in place.outcome().members
        place.hub.up()
        with observed(place):
            wait_for(lambda: place.outcome().statuses[-1] == "RESULTS_UPLOADED", 60, "the final status")
    assert place.hub.statuses(place.model_id) == ["INITIATED", "PREPARED", "RUNNING", "RESULTS_UPLOADED"]
