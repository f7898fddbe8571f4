"""Colour jitter beside torchvision's functions on each image alone, and how its factors are distributed."""

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional

from pipelines.augmentations.color_jitter import ColorJitter
from pipelines.config import AugmentationConfig

FUNCTIONS = (
    functional.adjust_brightness,
    functional.adjust_contrast,
    functional.adjust_saturation,
    functional.adjust_hue,
)


def images(count):
    """(count, 32, 32, 3) uint8: noise; the upper half is grey, black and white."""
    bytes_ = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    bytes_[:, :16] = bytes_[:, :16, :, :1]
    bytes_[:, :4] = 255 * (bytes_[:, :4] // 128)
    return bytes_


@pytest.mark.parametrize("kind", range(4))
@pytest.mark.parametrize("strength", [0.1, 0.5])
def test_each_operation_is_torchvisions_within_one_rounding(kind, strength):
    augmentation = ColorJitter(tuple(strength if kind == place else 0.0 for place in range(4)))
    drawn, batch = augmentation.draw(0, 0, np.arange(30)), images(30)
    assert drawn.shape == (30, 1, 2) and (drawn[..., 0] == kind).all()
    changed = augmentation.apply(batch, drawn)
    assert (changed != batch).float().mean() > 0.2
    for image, factor, found in zip(batch, drawn[:, 0, 1].tolist(), changed, strict=True):
        expected = FUNCTIONS[kind](image.permute(2, 0, 1), factor).permute(1, 2, 0)
        difference = (found.int() - expected.int()).abs()
        assert difference.max() <= 1
        assert kind == 3 or (difference > 0).float().mean() < 0.01  # torchvision rounds hues another way


def test_operations_follow_each_other_in_the_order_drawn():
    augmentation, batch = ColorJitter((0.4, 0.4, 0.4, 0.0)), images(40)
    drawn = augmentation.draw(0, 0, np.arange(40))
    assert len({tuple(order) for order in drawn[..., 0].tolist()}) == 6
    for image, rows, found in zip(batch, drawn.tolist(), augmentation.apply(batch, drawn), strict=True):
        for kind, factor in rows:
            image = FUNCTIONS[int(kind)](image.permute(2, 0, 1), factor).permute(1, 2, 0)
        difference = (found.int() - image.int()).abs()
        assert difference.max() <= 3 and (difference > 0).float().mean() < 0.01


def test_factors_are_uniform_and_orders_equally_likely():
    drawn = ColorJitter((0.4, 0.2, 1.5, 0.1)).draw(0, 0, np.arange(24_000))
    ranges = [(0.6, 1.4), (0.8, 1.2), (0.0, 2.5), (-0.1, 0.1)]
    for kind, (low, high) in enumerate(ranges):
        factors = drawn[drawn[..., 0] == kind][:, 1]
        assert len(factors) == 24_000 and low <= factors.min() and factors.max() <= high
        counts, _ = np.histogram(factors, 20, (low, high))
        assert ((counts - 1200) ** 2 / 1200).sum() < 19 + 4 * np.sqrt(2 * 19)  # χ²
    counts = np.bincount(np.unique(drawn[..., 0], axis=0, return_inverse=True)[1].reshape(-1))
    assert len(counts) == 24 and ((counts - 1000) ** 2 / 1000).sum() < 23 + 4 * np.sqrt(2 * 23)


def test_strengths_of_0_change_nothing():
    (augmentation,) = AugmentationConfig(color_jitter=(0, 0, 0, 0)).pixel_augmentations(training=True)
    batch = images(3)
    assert torch.equal(augmentation.apply(batch, augmentation.draw(0, 0, np.arange(3))), batch)
