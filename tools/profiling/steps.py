"""Steps of training and inference on a resident batch, and their times by turns. Needs PyTorch alone."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from training.optim import build_optimizer
from training.options import OptimConfig

WARM_UP = 4  # steps of each model before any is timed: on a CPU the first two or three meet page faults


def train_step(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, amp) -> Callable[[], None]:
    """A step of training: forward, loss, backward, SGD."""
    model.train()
    optimizer = build_optimizer(model, OptimConfig(lr=1e-3))  # small: the labels are noise

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with amp():
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()

    return step


def inference_step(model: torch.nn.Module, images: torch.Tensor, amp) -> Callable[[], None]:
    """A forward pass in eval mode."""
    model.eval()

    @torch.inference_mode()
    def step() -> None:
        with amp():
            model(images)

    return step


def seconds_in_turns(steps: list[Callable[[], None]], rounds: int, device: torch.device) -> list[list[float]]:
    """Seconds of each of `steps` in each of `rounds`, taken in turns."""
    seconds = [[] for _ in steps]
    for round_ in range(WARM_UP + rounds):
        for step, found in zip(steps, seconds, strict=True):
            wait(device)
            start = time.perf_counter()
            step()
            wait(device)
            if round_ >= WARM_UP:
                found.append(time.perf_counter() - start)
    return seconds


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
