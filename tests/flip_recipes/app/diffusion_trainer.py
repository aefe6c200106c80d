"""The researcher's trainer for the job type diffusion: an autoencoder first, then what denoises its code."""

import nvflare.client as flare
import torch
from models import get_diffusion_model
from nvflare.client.tracking import SummaryWriter
from site_data import deliver, difference, images, load, wait_while_held

torch.set_num_threads(1)


def loss_of(model, task: str, pixels):
    if task.endswith("_ae"):
        return torch.nn.functional.mse_loss(model.reconstruct(pixels), pixels)
    return model.denoise(pixels).square().mean()


def train(model, task: str, pixels) -> float:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        loss = loss_of(model, task, pixels)
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    flare.init()
    pixels, _ = images(flare.get_site_name())
    writer, model = SummaryWriter(), get_diffusion_model()
    while flare.is_running():
        received = flare.receive()
        if received is None:
            break
        task = flare.get_task_name()
        load(model, received.params)
        if task.startswith("validate"):
            loss = loss_of(model, task, pixels).item()
            writer.add_scalar(f"{task}_loss".upper(), loss)
            deliver()
            flare.send(flare.FLModel(metrics={"loss": loss}))
            continue
        if task == "train_dm":
            wait_while_held()
        writer.add_scalar(f"{task}_loss".upper(), train(model, task, pixels))
        deliver()
        update = flare.FLModel(
            params=difference(model, received.params), params_type="DIFF", meta={"NUM_STEPS_CURRENT_ROUND": 5}
        )
        flare.send(update)


if __name__ == "__main__":
    main()
