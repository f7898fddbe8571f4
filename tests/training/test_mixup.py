"""Mixup, CutMix and the smoothed loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.mixup import Mixer, Targets, cutmix_box, is_cutmix, mix, mixed_cross_entropy, mixup_share
from training.options import OptimConfig


def test_share_follows_beta_and_the_epoch():
    assert mixup_share(0.2, epoch=0, mixup_epochs=100, seed=0, step=3) == 1.0
    assert mixup_share(0.0, epoch=50, mixup_epochs=100, seed=0, step=3) == 1.0
    for epoch, alpha in ((50, 0.1), (100, 0.2), (250, 0.2)):
        draws = np.array([mixup_share(0.2, epoch, 100, seed=1, step=step) for step in range(4000)])
        assert ((draws >= 0) & (draws <= 1)).all()
        # Beta(a, a) has the mean 1/2 and the variance 1 / (4 (2a + 1))
        assert draws.mean() == pytest.approx(0.5, abs=0.03)
        assert draws.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)


def test_share_is_keyed_by_seed_epoch_and_step():
    base = mixup_share(0.2, 100, 100, seed=1, step=2)
    assert base == mixup_share(0.2, 100, 100, seed=1, step=2)
    assert base not in {
        mixup_share(0.2, 100, 100, seed=2, step=2),
        mixup_share(0.2, 101, 100, seed=1, step=2),
        mixup_share(0.2, 100, 100, seed=1, step=3),
    }


@pytest.mark.parametrize("count", [6, 7])
def test_neighbours_are_mixed(count):
    images = torch.arange(count, dtype=torch.float).view(-1, 1, 1, 1).expand(count, 3, 2, 2)
    mixed, targets = mix(images, torch.arange(count), torch.tensor(0.75), torch.tensor(0.75))
    partner = [1, 0, 3, 2, 5, 4, 6][:count]
    assert targets.mixed_in.tolist() == partner
    expected = 0.75 * torch.arange(count) + 0.25 * torch.tensor(partner)
    torch.testing.assert_close(mixed[:, 0, 0, 0], expected)


def test_a_share_of_1_leaves_images_and_loss_as_they_are():
    images, labels, one = torch.randn(6, 3, 4, 4), torch.arange(6), torch.ones(())
    mixed, targets = mix(images, labels, one, one)
    logits = torch.randn(6, 10)
    assert torch.equal(mixed, images)
    assert mixed_cross_entropy(logits, targets, 0.1) == mixed_cross_entropy(logits, Targets(labels), 0.1)


def test_halves_of_a_batch_are_mixed_as_the_whole():
    """Two ranks with half of the batch each see the same images as one rank."""
    images, labels, share = torch.randn(8, 3, 4, 4), torch.arange(8), torch.tensor(0.3)
    whole, targets = mix(images, labels, share, share)
    halves = [mix(images[part], labels[part], share, share) for part in (slice(0, 4), slice(4, 8))]
    assert torch.equal(whole, torch.cat([mixed for mixed, _ in halves]))
    assert torch.equal(targets.mixed_in, torch.cat([found.mixed_in for _, found in halves]))


@pytest.mark.parametrize("options", [{"mixup": 0.5, "mixup_epochs": 1}, {"cutmix": 1.0}])
def test_mixing_keeps_channels_last(options):
    images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    mixed, _ = mixed_in_step(images, **options)
    assert not torch.equal(mixed, images) and mixed.is_contiguous(memory_format=torch.channels_last)


def mixed_in_step(images, step=0, **options):
    """Images and targets of a step of epoch 1, with seed 0; the label of an image is its number."""
    mixer = Mixer(OptimConfig(**options), 0, images.device, images.dtype)
    mixer.draw(1, step, images.shape[-2:])
    return mixer(images, torch.arange(len(images)))


def test_nothing_is_mixed_without_the_options():
    images = torch.randn(4, 3, 8, 8)
    mixed, targets = mixed_in_step(images)
    assert mixed is images and targets.mixed_in is None and targets.share is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cutmix_takes_a_box_from_the_neighbour_and_the_label_by_its_area(dtype):
    images, partner, areas = torch.randn(5, 3, 20, 30).to(dtype), [1, 0, 3, 2, 4], set()
    for step in range(20):
        mixed, targets = mixed_in_step(images, step, cutmix=1.0)
        shares = cutmix_box(1.0, 0, 1, step)
        top, bottom, left, right = (round(share * side) for share, side in zip(shares, (20, 20, 30, 30), strict=True))
        expected = images.clone()
        expected[:, :, top:bottom, left:right] = images[partner][:, :, top:bottom, left:right]
        assert torch.equal(mixed, expected)
        assert targets.mixed_in.tolist() == partner
        area = (bottom - top) * (right - left)
        assert targets.share.item() == pytest.approx(1 - area / 600)
        areas.add(area)
    assert len(areas) > 15


def test_boxes_of_cutmix_follow_beta_and_the_paper():
    boxes = np.array([cutmix_box(1.0, seed=1, epoch=2, step=step) for step in range(8000)])
    assert boxes.min() >= 0 and boxes.max() <= 1 and (boxes[:, 1] >= boxes[:, 0]).all()
    inside = boxes[((boxes > 0) & (boxes < 1)).all(1)]  # not cut off
    heights, widths = inside[:, 1] - inside[:, 0], inside[:, 3] - inside[:, 2]
    np.testing.assert_allclose(heights, widths)
    # λ and the centre (y, x) are uniform: a box of side s = √(1 - λ) is not cut off with probability (1 - s)²
    assert len(inside) / 8000 == pytest.approx(1 / 6, abs=0.015)
    assert (heights**2).mean() == pytest.approx((1 / 2 - 4 / 5 + 1 / 3) * 6, abs=0.01)  # E[s² (1 - s)²] / E[(1 - s)²]
    centres = (inside[:, 0] + inside[:, 1]) / 2, (inside[:, 2] + inside[:, 3]) / 2
    assert [centre.mean() for centre in centres] == pytest.approx([0.5, 0.5], abs=0.02)
    assert abs(np.corrcoef(*centres)[0, 1]) < 0.1


def test_cutmix_is_keyed_by_seed_epoch_and_step():
    keys = [(1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4)]
    assert cutmix_box(0.5, *keys[0]) == cutmix_box(0.5, *keys[0])
    assert len({cutmix_box(0.5, *key) for key in keys}) == 4


def test_of_mixup_and_cutmix_each_takes_half_of_the_steps():
    both = OptimConfig(mixup=0.2, cutmix=1.0, mixup_epochs=1)
    chosen = [is_cutmix(both, seed=0, epoch=1, step=step) for step in range(4000)]
    assert np.mean(chosen) == pytest.approx(0.5, abs=0.03)
    assert {is_cutmix(OptimConfig(cutmix=1.0), 0, 1, step) for step in range(10)} == {True}
    assert {is_cutmix(OptimConfig(mixup=0.2), 0, 1, step) for step in range(10)} == {False}
    images, mixer = torch.randn(4, 3, 8, 8), Mixer(both, 0, torch.device("cpu"), torch.float32)
    for step in range(20):  # one mixer, so that nothing of the step before may be left
        mixer.draw(1, step, (8, 8))
        mixed, targets = mixer(images, torch.arange(4))
        alone = {"cutmix": 1.0} if chosen[step] else {"mixup": 0.2, "mixup_epochs": 1}
        expected, expected_targets = mixed_in_step(images, step, **alone)
        assert torch.equal(mixed, expected) and torch.equal(targets.share, expected_targets.share)


def test_mixups_share_of_label_and_pixels_is_the_same_in_bf16():
    images = torch.ones(2, 1, 1, 1, dtype=torch.bfloat16) * torch.tensor([[[[1.0]]], [[[0.0]]]], dtype=torch.bfloat16)
    mixed, targets = mixed_in_step(images, mixup=0.5, mixup_epochs=1)
    assert mixed[0].item() == targets.share.item() != 1.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("share", [1.0, 0.7])
def test_loss_against_its_definition(smoothing, share):
    """1 - ε on the true class, ε / (K - 1) on each of the others; mixed by the share."""
    torch.manual_seed(0)
    logits, labels, mixed_in = torch.randn(5, 10), torch.arange(5), torch.arange(5) + 3
    target = share * F.one_hot(labels, 10) + (1 - share) * F.one_hot(mixed_in, 10)
    target = target * (1 - smoothing) + (1 - target) * smoothing / 9
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    found = mixed_cross_entropy(logits, Targets(labels, mixed_in, torch.tensor(share)), smoothing)
    torch.testing.assert_close(found, expected)
