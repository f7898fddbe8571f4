"""RandAugment and TrivialAugment beside torchvision's, image by image, and how their operations are distributed."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from pipelines.augmentations import operations
from pipelines.augmentations.operations import LEVELS, NAMES, OPERATIONS, run_operations
from pipelines.augmentations.rand_augment import RandAugment, limits
from pipelines.augmentations.trivial_augment import LIMITS, TrivialAugment

THEIRS = {"rand": v2.RandAugment, "trivial": v2.TrivialAugmentWide}
OURS = {"rand": limits(64), "trivial": LIMITS}


def images(count):
    """(count, 64, 64, 3) uint8: noise, in some images of few colours."""
    generator = torch.Generator().manual_seed(0)
    bytes_ = torch.randint(0, 256, (count, 64, 64, 3), dtype=torch.uint8, generator=generator)
    bytes_[::3] = 60 + bytes_[::3] // 4
    return bytes_


def by_torchvision(image, kind, operation, level):
    """An image (64, 64, 3) changed by torchvision's operation at this place in its list, of a signed level."""
    transform = THEIRS[kind]()
    name, (magnitudes, signed) = list(transform._AUGMENTATION_SPACE.items())[operation]
    found = magnitudes(LEVELS, 64, 64)
    magnitude = 0.0 if found is None else float(found[abs(level)]) * (-1 if level < 0 else 1)
    assert name.lower() == NAMES[operation].replace(" ", "") and (level >= 0 or signed)
    if name == "Solarize":  # their threshold is rounded, and may miss the whole number that is meant
        return v2.functional.solarize(image, round(255 * magnitude, 3))
    how = {"interpolation": transform.interpolation, "fill": transform._fill}
    return transform._apply_image_or_video_transform(image.permute(2, 0, 1), name, magnitude, **how).permute(1, 2, 0)


@pytest.mark.parametrize("kind", THEIRS)
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_of_each_level_is_torchvisions_on_each_image_alone(kind, name):
    levels = range(1 - LEVELS if OPERATIONS[name].signed else 0, LEVELS)
    chosen = np.array([[NAMES.index(name), level] for level in levels for _ in range(2)])
    batch = images(len(chosen))
    changed = run_operations(batch, chosen, OURS[kind])
    for image, row, found in zip(batch, chosen.tolist(), changed, strict=True):
        assert torch.equal(found, by_torchvision(image, kind, *row)), row


@pytest.mark.parametrize(
    "augmentation, kind", [(RandAugment(1, 9), "rand"), (RandAugment(3, 14), "rand"), (TrivialAugment(), "trivial")]
)
def test_a_batch_of_many_operations_is_torchvisions(augmentation, kind):
    batch = images(40)
    drawn = augmentation.draw(1, 2, np.arange(40))
    changed = augmentation.apply(batch, drawn)
    for image, rows, found in zip(batch, drawn.reshape(40, -1, 2).tolist(), changed, strict=True):
        for row in rows:
            image = by_torchvision(image, kind, *row)
        assert torch.equal(found, image)


def test_images_of_one_operation_and_level_go_through_one_call(monkeypatch):
    calls = []

    def counted(images, magnitude):
        calls.append((len(images), magnitude))
        return images

    monkeypatch.setitem(operations.OPERATIONS, "rotate", OPERATIONS["rotate"]._replace(run=counted))
    rotate = NAMES.index("rotate")
    chosen = np.array([[rotate, 9], [0, 0], [rotate, -9], [rotate, 9], [rotate, 9]])
    assert torch.equal(run_operations(images(5), chosen, limits(64)), images(5))
    assert sorted(calls) == [(1, -9.0), (3, 9.0)]


def test_operations_of_rand_augment_are_equally_likely_and_their_signs_too():
    drawn = RandAugment(2, 9).draw(0, 0, np.arange(28_000))
    assert drawn.shape == (28_000, 2, 2)
    pairs = np.bincount(14 * drawn[:, 0, 0] + drawn[:, 1, 0], minlength=196)
    assert ((pairs - 28_000 / 196) ** 2 / (28_000 / 196)).sum() < 195 + 4 * np.sqrt(2 * 195)  # χ²
    for number, name in enumerate(NAMES):
        levels = drawn[drawn[..., 0] == number][:, 1]
        if OPERATIONS[name].signed:
            assert set(levels) == {-9, 9} and (levels > 0).mean() == pytest.approx(0.5, abs=0.04)
        else:
            assert set(levels) == ({0} if name in ("identity", "autocontrast", "equalize") else {9})


def test_operations_and_levels_of_trivial_augment_are_equally_likely():
    drawn = TrivialAugment().draw(0, 0, np.arange(14 * 31 * 50))
    counts = np.bincount(drawn[:, 0], minlength=14)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 13 + 4 * np.sqrt(2 * 13)
    for number, name in enumerate(NAMES):
        levels = drawn[drawn[:, 0] == number, 1]
        if name in ("identity", "autocontrast", "equalize"):
            assert set(levels) == {0}
            continue
        counts = np.bincount(np.abs(levels), minlength=LEVELS)
        assert len(counts) == LEVELS
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 30 + 4 * np.sqrt(2 * 30)
        share = (levels < 0).mean()
        assert share == (pytest.approx(0.5 * 30 / 31, abs=0.05) if OPERATIONS[name].signed else 0)
