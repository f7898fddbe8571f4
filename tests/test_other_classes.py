"""Whole runs on data with other classes than the weights have: evaluated by name, refused, or fine-tuned."""

import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dcd
from pipelines.build import build_loader
from pipelines.config import DataConfig
from tests.helpers import SMALL, last, read, run

NAMES = ["0_zero", "1_one", "2_two"]


@pytest.fixture(scope="module")
def without_first(tiny, tmp_path_factory) -> Path:
    """The same without its first class."""
    data = shutil.copytree(tiny, tmp_path_factory.mktemp("some") / "data")
    for split in ("train", "val"):
        shutil.rmtree(data / split / NAMES[0])
    return data


def new_model(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return dcd.create_model("mobilenetv2_dcd", 3, width_mult=0.1, fc_squeeze=16).eval()


@pytest.fixture(scope="module")
def weight(tmp_path_factory) -> Path:
    """Weights of which images of every class get every answer; they name their classes."""
    path = tmp_path_factory.mktemp("weight") / "three.pth"
    torch.save({"model": new_model().state_dict(), "classes": NAMES}, path)
    return path


def test_a_subset_is_evaluated_by_name(tiny, without_first, weight, main, tmp_path):
    """As the images of those classes in the whole set are."""
    output = main(*SMALL, "-d", without_first, "-c", tmp_path, "-b", 6, "--weight", weight, "--evaluate")
    assert f"evaluating on 2 of the 3 classes of {weight}" in output
    loader = build_loader(DataConfig(tiny, "torchvision", batch_size=23, workers=0, eval_size=32), "val")
    images, labels, _ = next(iter(loader))
    with torch.no_grad():
        logits = new_model()(images)[labels > 0]
    labels = labels[labels > 0]
    result = read(tmp_path, "evaluation.json")["result"]
    assert result["images"] == len(labels) == 15
    assert result["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert result["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())


def test_what_is_evaluated_on_other_classes_is_refused(tiny, without_first, weight, main, tmp_path):
    renamed = shutil.copytree(tiny, tmp_path / "data")
    (renamed / "val" / NAMES[0]).rename(renamed / "val" / "nil")
    common = [*SMALL, "-c", tmp_path / "out", "-b", 6, "--evaluate"]
    output = main(*common, "-d", renamed, "--weight", weight)
    assert "error: " in output and "nil are not among its 0_zero, 1_one, 2_two" in output

    nameless = tmp_path / "nameless.pth"  # as official ones are
    torch.save({"state_dict": new_model().state_dict()}, nameless)
    output = main(*common, "-d", tiny, "--weight", nameless)
    assert f"{nameless} does not name its classes: their order is assumed" in output and "(23 images)" in output
    output = main(*common, "-d", without_first, "--weight", nameless)
    assert "error: " in output and "has 3 classes, the data 2, and the checkpoint does not name them" in output
    output = main(*common, "-d", tiny, "--weight", nameless, "--num-classes", 4)
    assert f"error: --num-classes 4: {nameless} has 3 classes" in output


def test_fine_tuning_trains_the_classifier_alone(tiny, without_first, weight, main, tmp_path):
    """Begun on two ranks and gone on with one; then the data has other classes."""
    common = [
        *SMALL,
        "-b",
        8,
        "-c",
        tmp_path,
        "--weight",
        weight,
        "--freeze",
        "--ema",
        0.9,
        "--epochs",
        2,
        "--lr",
        0.001,
    ]
    output = run(*common, "-d", without_first, "--stop-after-steps", 3, ranks=2)
    assert output.count(f"{weight}: all but the classifier is loaded (3 classes there, 2 here)") == 1
    assert "going on from" in main(*common, "-d", without_first)
    state, before = last(tmp_path), new_model().state_dict()
    assert state["classes"] == NAMES[1:] and (state["epoch"], state["step"]) == (2, 0)
    kept = [name for name in before if not name.startswith("classifier.")]
    for average, prefix in ((False, ""), (True, "module.")):
        found = state["ema"] if average else state["model"]
        assert [name for name in kept if not torch.equal(found[prefix + name], before[name])] == []
        assert found[f"{prefix}classifier.bn1.num_batches_tracked"] == 8
        assert found[f"{prefix}classifier.static_linear.bias"].abs().max() > 0  # it began as zeros

    output = main(*SMALL, "-d", without_first, "-b", 8, "-c", tmp_path, "--evaluate")  # its own best checkpoint
    best = read(tmp_path, "summary.json")["best_top1"]
    assert f"{tmp_path / 'checkpoints' / 'best.pth'}: loss" in output and "error: " not in output
    assert 0 < read(tmp_path, "evaluation.json")["result"]["top1"] <= best  # the average may be the better one

    renamed = shutil.copytree(without_first, tmp_path / "data")
    for split in ("train", "val"):
        (renamed / split / NAMES[1]).rename(renamed / split / "unus")
    output = main(*common, "-d", renamed)
    assert "error: the checkpoint is of other classes (only there: 1_one; only here: unus)" in output
