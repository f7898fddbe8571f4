"""Lighting noise: what is added, and how it is distributed."""

import numpy as np
import torch

from pipelines.augmentations.lighting import Lighting
from pipelines.imagenet import COLOR_EIGENVALUES, COLOR_EIGENVECTORS


def test_each_image_gets_its_color_and_stays_in_range():
    images = torch.randint(0, 256, (50, 8, 8, 3), dtype=torch.uint8)
    augmentation = Lighting(0.3)
    shifts = augmentation.draw(0, 0, np.arange(50))
    expected = (images.numpy().astype(int) + shifts[:, None, None]).clip(0, 255)
    np.testing.assert_array_equal(augmentation.apply(images, shifts).numpy(), expected)
    assert (expected == 0).any() and (expected == 255).any()


def test_shifts_vary_along_the_principal_components():
    shifts = Lighting(0.1).draw(0, 0, np.arange(40_000)) / 255
    along = shifts @ np.linalg.inv(np.array(COLOR_EIGENVECTORS)).T  # α₁λ₁, α₂λ₂, α₃λ₃
    rounding = 1 / 255 / np.sqrt(12)
    expected = np.sqrt((0.1 * np.array(COLOR_EIGENVALUES)) ** 2 + rounding**2)
    np.testing.assert_allclose(along.std(0), expected, rtol=0.03)
    np.testing.assert_array_less(np.abs(along.mean(0)), 4 * expected / np.sqrt(40_000))
    normal = along[:, 0] / along[:, 0].std()
    np.testing.assert_allclose((np.abs(normal) < 1).mean(), 0.6827, atol=0.02)
    np.testing.assert_allclose((normal**4).mean(), 3, atol=0.2)
