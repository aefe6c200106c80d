"""The researcher's trainer, for the job types standard and fed_opt, by NVFLARE's Client API."""

import nvflare.client as flare
import torch
from models import get_model
from nvflare.client.tracking import SummaryWriter
from site_data import deliver, difference, images, load, score, wait_while_held

torch.set_num_threads(1)


def train(model, site: str) -> float:
    pixels, labels = images(site)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(pixels), labels)
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    flare.init()
    site, writer, model = flare.get_site_name(), SummaryWriter(), get_model()
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        load(model, received.params)
        loss, accuracy = score(model, site)
        if flare.is_evaluate():
            writer.add_scalar("TEST_LOSS@epoch", loss, global_step=7)
            deliver()
            flare.send(flare.FLModel(metrics={"loss": loss, "accuracy": accuracy}))
            continue
        if received.current_round:
            wait_while_held()
        # One with an axis of its own, one without.
        writer.add_scalar("TRAIN_LOSS@epoch", train(model, site), global_step=received.current_round * 5)
        writer.add_scalar("VAL_ACCURACY", accuracy)
        deliver()
        update = flare.FLModel(
            params=difference(model, received.params),
            params_type="DIFF",
            metrics={"accuracy": accuracy},
            meta={"NUM_STEPS_CURRENT_ROUND": 5},
        )
        flare.send(update)


if __name__ == "__main__":
    main()
