"""Metrics against their definition."""

import math

import pytest
import torch

from training.metrics import Metrics


@pytest.mark.parametrize("classes", [10, 3])
def test_sums(classes):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, classes), torch.randint(classes, (50,))
    metrics = Metrics(torch.device("cpu"))
    for start in range(0, 50, 16):
        part = slice(start, start + 16)
        losses = torch.nn.functional.cross_entropy(logits[part], labels[part], reduction="sum")
        metrics.update(losses, logits[part], labels[part])
    summary = metrics.reduce()

    rank_of_label = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert summary.images == 50
    assert summary.top1 == pytest.approx(100 * (rank_of_label < 1).float().mean().item())
    assert summary.top5 == pytest.approx(100 * (rank_of_label < 5).float().mean().item())
    assert summary.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics.reduce().images == 0, "reduce starts again from zero"


def test_images_without_finite_logits_count_as_wrong():
    """Even where a number that is none is the highest, and the class the label."""
    logits = torch.tensor([[2.0, 1.0], [torch.nan, 0.0], [torch.inf, 0.0], [0.0, 1.0]])
    metrics = Metrics(torch.device("cpu"))
    losses = torch.nn.functional.cross_entropy(logits, labels := torch.zeros(4, dtype=torch.int64), reduction="sum")
    assert metrics.update(losses, logits, labels).tolist() == [True, False, False, True]
    summary = metrics.reduce()
    assert (summary.top1, summary.images, summary.not_finite) == (25, 4, 2) and math.isnan(summary.loss)
    assert summary.warning.startswith("2 of 4 images have logits that are no finite numbers")
