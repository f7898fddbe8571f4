"""Mixup and the smoothed loss."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from training.mixup import Targets, mix, mixed_cross_entropy, mixup_share


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
    mixed, targets = mix(images, torch.arange(count), torch.tensor(0.75))
    partner = [1, 0, 3, 2, 5, 4, 6][:count]
    assert targets.mixed_in.tolist() == partner
    expected = 0.75 * torch.arange(count) + 0.25 * torch.tensor(partner)
    torch.testing.assert_close(mixed[:, 0, 0, 0], expected)


def test_a_share_of_1_leaves_images_and_loss_as_they_are():
    images, labels, one = torch.randn(6, 3, 4, 4), torch.arange(6), torch.ones(())
    mixed, targets = mix(images, labels, one)
    logits = torch.randn(6, 10)
    assert torch.equal(mixed, images)
    assert mixed_cross_entropy(logits, targets, 0.1) == mixed_cross_entropy(logits, Targets(labels), 0.1)


def test_halves_of_a_batch_are_mixed_as_the_whole():
    """Two ranks with half of the batch each see the same images as one rank."""
    images, labels, share = torch.randn(8, 3, 4, 4), torch.arange(8), torch.tensor(0.3)
    whole, targets = mix(images, labels, share)
    halves = [mix(images[part], labels[part], share) for part in (slice(0, 4), slice(4, 8))]
    assert torch.equal(whole, torch.cat([mixed for mixed, _ in halves]))
    assert torch.equal(targets.mixed_in, torch.cat([found.mixed_in for _, found in halves]))


def test_mixing_keeps_channels_last():
    images = torch.randn(4, 3, 8, 8).to(memory_format=torch.channels_last)
    assert mix(images, torch.arange(4), torch.tensor(0.5))[0].is_contiguous(memory_format=torch.channels_last)


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
