"""`dcd.load`: a trained model in one call, as the run that made it evaluates it."""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import dcd
from pipelines.build import build_loader
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.sources.folder import FolderSource
from tests.dcd.test_golden import GOLDEN, golden_input
from tests.helpers import SMALL, lines

OFFICIAL = GOLDEN / "mobilenetv2_dcd_w0.1_c10.pth.tar"
TRAINED = {"arch": "mobilenetv2_dcd", "num_classes": 3, "width_mult": 0.1, "fc_squeeze": 16}


def evaluate(model: torch.nn.Module, source: FolderSource) -> tuple[float, float]:
    """The loss, and top-1 in percent, by what the model itself says of its images and classes."""
    images = torch.stack([model.preprocessing(source.decode(index)) for index in range(len(source))])
    with torch.no_grad():
        logits = model(images)
    labels = torch.tensor([model.class_names.index(source.classes[label]) for label in source.labels])
    return F.cross_entropy(logits, labels).item(), 100 * (logits.argmax(1) == labels).double().mean().item()


def test_a_run_in_one_call(tiny, main, tmp_path):
    """Architecture, names, preprocessing and weights: what its own evaluations said."""
    options = [*SMALL, "-b", 12, "--epochs", 2, "--ema", 0.5, "--lr", 0.05, "--clip-grad", 5]
    options += ["--eval-size", 48, "--eval-crop", 0.8]
    assert "error: " not in main(*options, "-d", tiny, "-c", tmp_path)
    source, best = FolderSource(tiny / "val"), torch.load(tmp_path / "checkpoints" / "best.pth", weights_only=True)
    assert best.keys() == {
        "best", "architecture", "classes", "preprocessing", "config", "best_epoch", "best_top1", "model", "ema",
        "state_dict",
    }  # fmt: skip
    said = {kind: [(line["loss"], line["top1"]) for line in lines(tmp_path, kind)] for kind in ("eval", "eval_ema")}
    kind = "eval_ema" if best["best"] == "ema" else "eval"
    of_best = said[kind][best["best_epoch"]]
    assert best["best_top1"] == max(top1 for _, top1 in said["eval"] + said["eval_ema"]) == of_best[1]

    model = dcd.load(tmp_path)
    assert not model.training and model.class_names == ["0_zero", "1_one", "2_two"] and model.architecture == TRAINED
    assert (model.preprocessing.size, model.preprocessing.crop) == (48, 0.8)
    assert evaluate(model, source) == pytest.approx(of_best, rel=1e-5)
    for ema, kind in ((False, "eval"), (True, "eval_ema")):
        newest = dcd.load(tmp_path / "checkpoints" / "last.pth", ema=ema)
        assert evaluate(newest, source) == pytest.approx(said[kind][-1], rel=1e-5)

    with pytest.raises(dcd.CheckpointError, match=r"is of width_mult 0.1, not 1.0"):
        dcd.load(tmp_path, width_mult=1.0)
    (tmp_path / "checkpoints" / "best.pth").unlink()
    with pytest.raises(dcd.CheckpointError, match=r"no evaluation is done: name .*last\.pth"):
        dcd.load(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(dcd.CheckpointError, match="no output folder of a run"):
        dcd.load(tmp_path)


def test_an_official_checkpoint(tmp_path):
    """It says its name, and not its sizes; a bare state dict does not even say the name."""
    model = dcd.load(OFFICIAL, width_mult=0.1, fc_squeeze=16)
    assert model.architecture == {"arch": "mobilenetv2_dcd", "num_classes": 10, "width_mult": 0.1, "fc_squeeze": 16}
    assert model.class_names is None and model.preprocessing == dcd.Preprocessing()
    with torch.no_grad():
        logits = model(golden_input(2).float()).numpy()
    expected = np.load(f"{OFFICIAL}.npz")["logits"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(dcd.CheckpointError, match="does not fit this model"):
        dcd.load(OFFICIAL)

    bare = tmp_path / "bare.pth"
    torch.save(model.state_dict(), bare)
    with pytest.raises(dcd.CheckpointError, match=re.escape(f"{bare} does not say what it is of: name it")):
        dcd.load(bare)
    assert dcd.load(bare, "mobilenetv2_dcd", width_mult=0.1, fc_squeeze=16).architecture == model.architecture
    torch.save({"model": model.state_dict(), "classes": ["ant", "bee"], "architecture": model.architecture}, bare)
    with pytest.raises(dcd.CheckpointError, match="names 2 classes of 10 outputs"):
        dcd.load(bare)


@pytest.mark.parametrize("crop", [0.8, 1.0])
def test_preprocessing_is_that_of_the_loaders(tiny, crop):
    config = DataConfig(tiny, "torchvision", batch_size=23, workers=0, eval_size=48)
    loader = build_loader(config, "val", augmentation=AugmentationConfig(eval_crop=crop))
    (batch,) = list(loader)
    loader.close()
    source = FolderSource(tiny / "val")
    one_by_one = torch.stack([dcd.Preprocessing(48, crop)(source.decode(index)) for index in range(len(source))])
    torch.testing.assert_close(one_by_one, batch.images, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"\(3, height, width\) in uint8, not \(3, 8, 8\) in torch.float32"):
        dcd.Preprocessing()(torch.zeros(3, 8, 8))
