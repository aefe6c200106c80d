"""What the researcher's scripts share: a site's images, made here, and how a model does on them."""

import os
import time
from pathlib import Path

import torch
from torch import nn

IMAGES = 64


def images(site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of 8 by 8 pixels with a bright upper or lower half, and which half it is. The same ones every time."""
    noise = torch.Generator().manual_seed(sum(site.encode()))
    labels = torch.arange(IMAGES) % 2
    pixels = torch.rand((IMAGES, 8, 8), generator=noise)
    pixels[labels == 0, :4] += 0.5
    pixels[labels == 1, 4:] += 0.5
    return pixels.reshape(IMAGES, 64), labels


def score(model: nn.Module, site: str) -> tuple[float, float]:
    """Loss and accuracy on a site's images."""
    pixels, labels = images(site)
    with torch.no_grad():
        answers = model(pixels)
    return nn.functional.cross_entropy(answers, labels).item(), (answers.argmax(1) == labels).float().mean().item()


def load(model: nn.Module, params: dict) -> None:
    model.load_state_dict({name: torch.as_tensor(value) for name, value in params.items()})


def difference(model: nn.Module, params: dict) -> dict:
    """What training has changed, as FLIP's aggregators want it."""
    return {name: value.numpy() - params[name] for name, value in model.state_dict().items()}


def deliver() -> None:
    """Metrics travel beside results: they are given time to arrive in the round that they belong to."""
    time.sleep(1)


def wait_while_held() -> None:
    """The test that watches keeps training from ending as long as this file is there."""
    hold = os.environ.get("FLIP_TEST_HOLD")
    while hold and Path(hold).exists():
        time.sleep(0.1)
