"""Mixup (Zhang et al., arXiv 1710.09412) and the loss that goes with it."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """Labels (N,) int64 and those that are mixed in (N,), with the share of the first, a scalar in [0, 1]; None where
    nothing is mixed in."""

    labels: Tensor
    mixed_in: Tensor | None = None
    share: Tensor | None = None


def mixup_share(alpha: float, epoch: int, mixup_epochs: int, seed: int, step: int) -> float:
    """The share of the first image, drawn from Beta(a, a) with a = alpha · min(1, epoch / mixup_epochs).

    One number for a global batch, keyed by (seed, epoch, step): the same on every rank and after a resume.
    """
    alpha *= min(1.0, epoch / mixup_epochs)
    return float(np.random.default_rng([seed, epoch, step]).beta(alpha, alpha)) if alpha > 0 else 1.0


def mix(images: Tensor, labels: Tensor, share: Tensor) -> tuple[Tensor, Targets]:
    """`share` of each image and `1 - share` of its neighbour, in pairs (0, 1), (2, 3), ...

    The batch is shuffled already, so a neighbour is as good as a random partner. Pairs lie within one part of one
    rank's share: while those are even, the mixed images do not depend on the world size. The last of an odd number
    stays as it is, and then they do.

    Args:
        images: (N, C, H, W). labels: (N,). share: a scalar on their device, rounded to the dtype of the images.
    """
    count = len(images)
    partner = (torch.arange(count, device=images.device) ^ 1).clamp(max=count - 1)
    mixed = torch.lerp(images[partner], images, share.to(images.dtype))
    return mixed, Targets(labels, labels[partner], share)


def mixed_cross_entropy(logits: Tensor, targets: Targets, smoothing: float) -> Tensor:
    """Mean cross-entropy of logits (N, K) against mixed targets, in float32; a scalar.

    `smoothing` ε leaves 1 - ε to the true class and spreads ε over the other K - 1, as the official trainer does;
    PyTorch's own spreads its ε over all K classes, which is the same with ε · K / (K - 1).
    """
    classes = logits.shape[1]
    logits, epsilon = logits.float(), smoothing * classes / max(1, classes - 1)
    loss = F.cross_entropy(logits, targets.labels, label_smoothing=epsilon)
    if targets.mixed_in is None:
        return loss
    mixed_in = F.cross_entropy(logits, targets.mixed_in, label_smoothing=epsilon)
    return torch.lerp(mixed_in, loss, targets.share.to(loss.dtype))
