"""Random erasing: which rectangles, and what is in them."""

import numpy as np
import pytest
import torch

from pipelines.augmentations.random_erasing import RandomErasing

MEAN_COLOR = torch.tensor([124, 116, 104], dtype=torch.uint8)


def test_the_rectangle_has_the_mean_color_and_the_rest_stays():
    images = torch.randint(0, 100, (40, 50, 50, 3), dtype=torch.uint8)
    augmentation = RandomErasing(0.7)
    drawn = augmentation.draw(0, 0, np.arange(40))
    changed = augmentation.apply(images, drawn)
    for image, box, found in zip(images, np.rint(50 * drawn).astype(int), changed, strict=True):
        top, left, bottom, right = box
        image = image.clone()
        image[top:bottom, left:right] = MEAN_COLOR
        assert torch.equal(found, image)
    assert 0 < (changed == images).all((1, 2, 3)).sum() < 40


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_rectangles_are_as_in_the_paper(probability):
    boxes = RandomErasing(probability).draw(0, 0, np.arange(20_000))
    top, left, bottom, right = boxes[boxes.any(1)].T
    assert len(top) / len(boxes) == pytest.approx(probability, abs=0.015)
    assert min(top.min(), left.min()) >= 0 and max(bottom.max(), right.max()) <= 1
    area, ratio = (bottom - top) * (right - left), (bottom - top) / (right - left)
    assert 0.02 <= area.min() < 0.022 and 0.32 < area.max() <= 0.33 + 1e-9
    assert 0.3 - 1e-9 <= ratio.min() < 0.31 and 3.2 < ratio.max() <= 3.3 + 1e-9
    assert area.mean() == pytest.approx(0.175, abs=0.005)
    assert np.log(ratio).mean() == pytest.approx(0, abs=0.03)
    place = top / (1 - (bottom - top))
    assert place.mean() == pytest.approx(0.5, abs=0.02) and place.var() == pytest.approx(1 / 12, abs=0.005)
