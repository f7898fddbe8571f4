"""Figures of an evaluation: pure functions of what a model has answered. Shares and errors are in percent."""

from typing import Any

import torch
from torch import Tensor

from tools.evaluation.records import Answers

BINS = 15
NO_OUTPUT = -2  # a label that the model does not have; an answer that it does not give is -1
# Top-1 errors of AlexNet in percent, the mean of five severities, by which ImageNet-C's authors divide (arXiv
# 1903.12261, with these digits in their repository, hendrycks/robustness)
ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640, "defocus_blur": 81.9880,
    "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360, "snow": 86.6816, "frost": 82.6572,
    "fog": 81.9324, "brightness": 56.4592, "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}  # fmt: skip


def calibration(confidences: Tensor, right: Tensor) -> dict[str, Any]:
    """The expected calibration error and its bins (Guo et al., arXiv 1706.04599, eq. 3).

    Images of confidence c in ((b - 1)/15, b/15] are in bin b. The error is the mean over all images of
    |accuracy - confidence| of their bin.

    Args:
        confidences: (N,) in [0, 1]; images with nan are left out. right: (N,) bool.

    Returns:
        {"ece", "images", "bins": [{"from", "to", "images", "confidence", "accuracy"}]}; means of no images are nan.
    """
    right, confidences = right[~confidences.isnan()].double(), confidences[~confidences.isnan()]
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    numbers = torch.bucketize(confidences, edges[1:-1])
    images = numbers.bincount(minlength=BINS)
    means = [100 * numbers.bincount(values, minlength=BINS) / images for values in (confidences, right)]
    gaps = (means[0] - means[1]).abs().nan_to_num() * images
    keys = ("from", "to", "images", "confidence", "accuracy")
    columns = (100 * edges[:-1], 100 * edges[1:], images, *means)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    bins = [dict(zip(keys, row, strict=True)) for row in rows]
    return {"ece": (gaps.sum() / images.sum()).item(), "images": len(right), "bins": bins}


def per_class(answers: Answers, names: list[str]) -> list[dict[str, Any]]:
    """For each class with images: {"class", "images", "top1", "top5"}."""
    count = len(names)
    images = answers.labels.bincount(minlength=count).tolist()
    first = answers.labels[answers.hits[:, 0]].bincount(minlength=count).tolist()
    five = answers.labels[answers.hits.any(1)].bincount(minlength=count).tolist()
    return [
        {"class": names[label], "images": images[label], "top1": 100 * first[label] / images[label],
         "top5": 100 * five[label] / images[label]}
        for label in range(count) if images[label]
    ]  # fmt: skip


def confusion(answers: Answers, count: int) -> list[list[int]]:
    """[label, answer, images] for each pair that occurs, right answers included; the most frequent first.

    Images without an answer, whose logits are no finite numbers, are left out.
    """
    answered = answers.top[:, 0] >= 0
    pairs, images = (answers.labels * count + answers.top[:, 0])[answered].unique(return_counts=True)
    rows = zip(pairs.tolist(), images.tolist(), strict=True)
    return sorted(([*divmod(pair, count), number] for pair, number in rows), key=lambda row: -row[2])


def reassessed(answers: Answers, labels: list[list[int]]) -> dict[str, Any]:
    """Accuracy by several labels for each image, as ImageNet-ReaL's: an answer that is one of them is right.

    Args:
        labels: for each of the N images, outputs of the model or `NO_OUTPUT`; images without any are left out.
    """
    kept = torch.tensor([bool(each) for each in labels])
    widest = max(map(len, labels), default=0) or 1
    table = torch.tensor([[*each, *[NO_OUTPUT] * (widest - len(each))] for each in labels])  # [N, widest]
    hits = (answers.top[:, :, None] == table[:, None, :]).any(2)[kept]  # [kept, 5]
    images = len(hits)
    return {
        "images": images,
        "without_labels": len(labels) - images,
        "top1": 100 * hits[:, 0].double().mean().item(),
        "top5": 100 * hits.any(1).double().mean().item(),
        "calibration": calibration(answers.confidences[kept], hits[:, 0]),
    }


def corruption_errors(top1: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Mean errors over ImageNet-C.

    Args:
        top1: {corruption: {severity: accuracy}}.

    Returns:
        {"error": {corruption: its mean over the severities}, "mean_error": over those of the benchmark's 15 corruptions
        that are there, "mce": the mean of their errors divided by AlexNet's, or None where anything is missing,
        "missing": corruptions and severities, "extra": corruptions that count for neither}
    """
    error = {name: 100 - sum(each.values()) / len(each) for name, each in top1.items()}
    counted = [error[name] for name in ALEXNET if name in error]
    missing = [
        name if name not in top1 else f"{name} {severity}"
        for name in ALEXNET
        for severity in range(1, 6)
        if severity not in top1.get(name, {}) and (name in top1 or severity == 1)
    ]
    return {
        "error": error,
        "mean_error": sum(counted) / len(counted) if counted else None,
        "mce": None if missing else sum(100 * error[name] / ALEXNET[name] for name in ALEXNET) / len(ALEXNET),
        "missing": missing,
        "extra": [name for name in error if name not in ALEXNET],
    }
