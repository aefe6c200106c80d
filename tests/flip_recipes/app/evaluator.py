"""The researcher's evaluator: scores each model on the site's images, and keeps more for the results' file."""

import os

import nvflare.client as flare
import torch
from models import get_model
from site_data import load, score, wait_while_held

torch.set_num_threads(1)


def main() -> None:
    flare.init()
    site, model = flare.get_site_name(), get_model()
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        name = received.meta["flip_eval_model_name"]
        wait_while_held()
        if f"{site}:{name}" in os.environ.get("FLIP_TEST_FAILS", "").split():
            raise RuntimeError(f"{site} cannot evaluate {name}")
        load(model, received.params)
        loss, accuracy = score(model, site)
        reply = flare.FLModel(
            metrics={"loss": loss, "accuracy": accuracy, "undefined": float("nan"), "by_half": {"upper": accuracy}},
            meta={"flip_supplementary_results": {"per_image": [loss, accuracy], "by_half": {"note": "made here"}}},
        )
        flare.send(reply)


if __name__ == "__main__":
    main()
