"""Writes a job as FLIP's own recipes make it. Run by the Python that has flip-utils, once for a job.

``write_job.py KIND FOLDER MODEL_ID`` prints the path of the job that it has made below the folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flip.nvflare.recipes import FlipDiffusionRecipe, FlipEvalRecipe, FlipFedAvgRecipe, FlipFedOptRecipe

APP = Path(__file__).parent / "app"
SITES = 2
TRAINING: Mapping[str, Any] = {"min_clients": SITES, "wait_time_after_min_received": 0}
ROUNDS: Mapping[str, Any] = {"num_rounds": 2, "best_model_metric": "accuracy"}
PHASES: Mapping[str, Any] = {"num_rounds_ae": 2, "num_rounds_dm": 1}

RECIPES: Mapping[str, Callable[[str], Any]] = {
    "standard": lambda model: FlipFedAvgRecipe(**TRAINING, **ROUNDS, model_id=model),
    "fed_opt": lambda model: FlipFedOptRecipe(**TRAINING, **ROUNDS, model_id=model),
    "diffusion": lambda model: FlipDiffusionRecipe(**TRAINING, **PHASES, model_id=model),
    "diffusion_as_it_is": lambda model: FlipDiffusionRecipe(**TRAINING, **PHASES, model_id=model),
    "evaluation": lambda model: FlipEvalRecipe(min_clients=SITES, model_id=model),
}
SCRIPTS = {
    "diffusion": ("diffusion_trainer.py", "trainer.py"),
    "diffusion_as_it_is": ("diffusion_trainer.py", "trainer.py"),
    "evaluation": ("evaluator.py", "evaluator.py"),
}
"""Which file of :data:`APP` is a job's script, and what it is called there; ``trainer.py`` where nothing is said."""
MODELS = {"diffusion": "get_handed_over_model", "diffusion_as_it_is": "get_diffusion_model"}
"""Which function of the app's models is the job's ``get_model``, where it is another one."""


def write_job(kind: str, folder: Path, model_id: str) -> Path:
    """Export the recipe of a job type and put the researcher's files into it. Returns the job's folder."""
    recipe = RECIPES[kind](model_id)
    recipe.export(folder)
    job = folder / str(recipe.job.name)
    custom = job / "app" / "custom"
    custom.mkdir(exist_ok=True)
    source, target = SCRIPTS.get(kind, ("trainer.py", "trainer.py"))
    shutil.copy(APP / source, custom / target)
    shutil.copy(APP / "site_data.py", custom)
    models = (APP / "models.py").read_text()
    if kind in MODELS:
        models += f"\n\nget_model = {MODELS[kind]}\n"
    (custom / "models.py").write_text(models)
    # Where FLIP's own server has the model saved, and where its components look for it.
    (job / "app" / "config" / "environment.json").write_text(json.dumps({"APP_CKPT_DIR": "model"}))
    if kind == "evaluation":
        _add_models(custom)
    return job


def _add_models(custom: Path) -> None:
    import torch

    sys.path.insert(0, str(custom))
    import models  # type: ignore[import-not-found]  # the copy in the job

    found = {"first": models.get_model, "second": models.get_other_model}
    config = {name: {"checkpoint": f"{name}.pt", "path": f"models.{make.__name__}"} for name, make in found.items()}
    (custom / "config.json").write_text(json.dumps({"models": config}))
    for name, make in found.items():
        torch.save(make().state_dict(), custom / f"{name}.pt")


if __name__ == "__main__":
    print(write_job(sys.argv[1], Path(sys.argv[2]), sys.argv[3]))
