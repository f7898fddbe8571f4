"""Mixup (Zhang et al., arXiv 1710.09412), CutMix (Yun et al., arXiv 1905.04899) and the loss that goes with them."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.options import OptimConfig


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


def cutmix_box(alpha: float, seed: int, epoch: int, step: int) -> tuple[float, float, float, float]:
    """Top, bottom, left and right of the box that comes from the other image, as shares of the side in [0, 1].

    The box has the share 1 - λ of the area, λ drawn from Beta(alpha, alpha), with any centre in the image. What
    lies outside is cut off. One box for a global batch, keyed like `mixup_share`.
    """
    rng = np.random.default_rng([seed, epoch, step, 1])
    half = 0.5 * np.sqrt(1 - rng.beta(alpha, alpha))
    y, x = rng.random(2)
    top, bottom, left, right = np.clip([y - half, y + half, x - half, x + half], 0, 1).tolist()
    return top, bottom, left, right


def is_cutmix(options: OptimConfig, seed: int, epoch: int, step: int) -> bool:
    """Whether this step is CutMix's: always where there is no mixup, else in half of the steps, keyed like the rest."""
    if options.cutmix > 0 and options.mixup > 0:
        return np.random.default_rng([seed, epoch, step, 2]).random() < 0.5
    return options.cutmix > 0


class Mixer:
    """Mixup and CutMix of a run. What changes from step to step lies on the device, where a recorded step reads it.

    Args:
        options: `mixup`, `mixup_epochs` and `cutmix` are used. seed: of the draws.
        dtype: of the images in the step; mixup's share is rounded to it.
    """

    def __init__(self, options: OptimConfig, seed: int, device: torch.device, dtype: torch.dtype):
        self._options, self._seed = options, seed
        self._pixels = torch.ones((), dtype=dtype, device=device)  # share of an image's own outside the box
        self._labels = torch.ones((), device=device)
        self._box = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)]

    def draw(self, epoch: int, step: int, size: tuple[int, int]) -> None:
        """What this step mixes, for images of this height and width in pixels."""
        options, key = self._options, (self._seed, epoch, step)
        if is_cutmix(options, *key):
            height, width = size
            shares = cutmix_box(options.cutmix, *key)
            box = [round(share * side) for share, side in zip(shares, (height, height, width, width), strict=True)]
            top, bottom, left, right = box
            self._pixels.fill_(1.0)
            self._labels.fill_(1 - (bottom - top) * (right - left) / (height * width))
        elif options.mixup > 0:
            box = [0, 0, 0, 0]
            self._pixels.fill_(mixup_share(options.mixup, epoch, options.mixup_epochs, self._seed, step))
            self._labels.copy_(self._pixels)
        else:
            return
        if options.cutmix > 0:  # else nothing reads them
            for border, place in zip(self._box, box, strict=True):
                border.fill_(place)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Targets]:
        """The images (N, C, H, W) mixed as `draw` has set it, and what they are to be classified as."""
        if self._options.cutmix > 0:
            return mix(images, labels, self._pixels * self._outside_box(*images.shape[-2:]), self._labels)
        if self._options.mixup > 0:
            return mix(images, labels, self._pixels, self._labels)
        return images, Targets(labels)

    def _outside_box(self, height: int, width: int) -> Tensor:
        """(H, W) bool."""
        top, bottom, left, right = self._box
        rows, columns = (torch.arange(side, device=top.device) for side in (height, width))
        inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        return ~(inside_rows[:, None] & inside_columns)


def mix(images: Tensor, labels: Tensor, pixels: Tensor, share: Tensor) -> tuple[Tensor, Targets]:
    """`pixels` of each image and `1 - pixels` of its neighbour, in pairs (0, 1), (2, 3), ...

    The batch is shuffled already, so a neighbour is as good as a random partner. Pairs lie within one part of one
    rank's share: while those are even, the mixed images do not depend on the world size. The last of an odd number
    stays as it is, and then they do.

    Args:
        images: (N, C, H, W). labels: (N,).
        pixels: a scalar on their device, or (H, W), in [0, 1]; rounded to the dtype of the images.
        share: a scalar, the share of an image's own label.
    """
    count = len(images)
    partner = (torch.arange(count, device=images.device) ^ 1).clamp(max=count - 1)
    mixed = torch.lerp(images[partner], images, pixels.to(images.dtype))
    return mixed, Targets(labels, labels[partner], share)


def mixed_cross_entropy(logits: Tensor, targets: Targets, smoothing: float) -> Tensor:
    """Mean cross-entropy of logits (N, K) against mixed targets, in float32; a scalar.

    `smoothing` ε leaves 1 - ε to the true class and spreads ε over the other K - 1, as the official trainer does;
    PyTorch's own spreads its ε over all K classes, which is the same with ε · K / (K - 1).
    """
    classes = logits.shape[1]
    logits, epsilon = logits.float(), smoothing * classes / max(1, classes - 1)
    loss = F.cross_entropy(logits, targets.labels, label_smoothing=epsilon)
    if targets.mixed_in is None or targets.share is None:
        return loss
    mixed_in = F.cross_entropy(logits, targets.mixed_in, label_smoothing=epsilon)
    return torch.lerp(mixed_in, loss, targets.share.to(loss.dtype))
