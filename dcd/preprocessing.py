"""What is done to an image before a model sees it: as in the evaluations of the training that made the model."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """Cut the square in the middle, resize it, and normalise it.

    size: side of the result in pixels. crop: share of the shorter side that the square has, in (0, 1]; 224 / 256 is
    "resize the shorter side to 256, cut 224". mean, std: of red, green and blue in [0, 1]. flip: whether an evaluation
    takes the mean of the logits of each image and of its mirror image, `images.flip(3)`, which a call does not make.
    """

    size: int = 224
    crop: float = 224 / 256
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    flip: bool = False

    def __call__(self, image: Tensor) -> Tensor:
        """From one image (3, H, W), uint8, RGB, to (3, size, size) float32, on the same device."""
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
            raise ValueError(f"an image is (3, height, width) in uint8, not {tuple(image.shape)} in {image.dtype}")
        height, width = image.shape[1:]
        side = max(1, round(min(height, width) * self.crop))
        top, left = (height - side) // 2, (width - side) // 2
        square = image[None, :, top : top + side, left : left + side]
        if square.is_cuda:  # a GPU resizes floats only
            square = square.float()
        resized = F.interpolate(square, (self.size, self.size), mode="bilinear", antialias=True)[0]
        mean, std = (torch.tensor(of, device=image.device)[:, None, None] for of in (self.mean, self.std))
        return (resized.round().float() / 255 - mean) / std

    def to_dict(self) -> dict[str, Any]:
        """For a file: plain numbers and lists."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """From `to_dict`."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)
