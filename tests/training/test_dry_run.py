"""`--dry-run`: what it says of a run, on one process and on two, and that it leaves nothing behind."""

import re
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import SMALL, build_trainer, run
from training.config import Config
from training.dry_run import STEPS, WARM_UP, changed_options, dry_run
from training.options import ConfigError
from training.train_step import TrainStep


def figures(output: str, line: str) -> list[float]:
    """The numbers in the line that begins so."""
    (found,) = [each for each in output.splitlines() if each.startswith(f"{line}: ")]
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?", found)]


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_real_one(ranks, tmp_path, tiny):
    """With everything that a step may have, and images that grow: the largest are tried."""
    flags = ["-d", tiny, "-b", 12, "--epochs", 5, "--accumulate", 2, "--start-size", 32, "--size-ramp", 1, 2]
    everything = [*SMALL, *flags, "--input-size", 64, "--mixup", 0.2, "--ema", 0.9, "--clip-grad", 1]
    output = run(*everything, "-c", tmp_path / "run", "--dry-run", ranks=ranks)
    assert not (tmp_path / "run").exists(), "nothing is written"
    assert output.count("  epochs: 5\n") == output.count("  num_classes: 3\n") == 1, "one rank prints"
    assert "  gamma: " not in output and "  dry_run: " not in output
    assert figures(output, "data") == [48, 23, 3]
    assert figures(output, "steps") == [4, 20, 5, 12]
    assert "start: the first step\n" in output
    assert 0.1 < figures(output, "memory")[0] < 10
    rate, world_size, *steps = figures(output, "rate")
    assert rate > 0 and world_size == (ranks or 1) and steps == [STEPS, 12, 64, 64]
    hours, minutes, seconds = map(int, re.search(r"^time: (\d+):(\d+):(\d+) ", output, re.M).groups())
    assert 3600 * hours + 60 * minutes + seconds == pytest.approx(20 * 12 / rate, abs=1, rel=0.01)


@pytest.fixture
def tried(tmp_path, capsys):
    """What --dry-run prints of a trainer in this process, whose steps can be replaced."""

    def call(step=None, **options) -> str:
        trainer = build_trainer(tmp_path, input_size=32, **options)
        before = sorted(tmp_path.rglob("*"))
        trainer.train_step.__class__ = type("Replaced", (TrainStep,), {"__call__": step} if step else {})
        capsys.readouterr()
        dry_run(trainer)
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().out

    return call


def test_the_warm_up_is_not_timed(tried):
    calls = []

    def step(self, batch, progress):
        images, labels, indices = batch
        assert images.shape == (16, 3, 32, 32) and images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == indices.shape == (16,) and labels.min() >= 0 and labels.max() < 5
        assert self.model.training
        calls.append(progress.global_step)
        time.sleep(0.2 if len(calls) <= WARM_UP else 0.01)

    rate = figures(tried(step), "rate")[0]
    assert calls == list(range(WARM_UP + STEPS))
    assert 16 / 0.05 < rate < 16 / 0.01


def test_what_is_frozen_is_not_counted_as_trained(tried):
    count, trained = figures(tried(freeze=True, weight=Path("x.pth")), "model")
    model = Config().with_options(arch="mobilenetv2_dcd", num_classes=5, width_mult=0.1, fc_squeeze=16).model.create()
    assert count == sum(each.numel() for each in model.parameters())
    assert trained == sum(each.numel() for each in model.classifier.parameters())


def test_where_the_run_would_go_on(tried, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pth").touch()
    assert f"start: the run would go on from {tmp_path}/checkpoints/last.pth\n" in tried()
    (tmp_path / "x.pth").touch()
    assert f"start: the run would go on from {tmp_path}/x.pth\n" in tried(resume=tmp_path / "x.pth")


def test_one_line_where_a_step_does_not_fit(tried):
    def step(self, batch, progress):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nAnd more")

    with pytest.raises(ConfigError, match="a step of 16 images does not fit .* --batch-size, .*2.00 GiB.\\)$"):
        tried(step)


def test_options_that_were_changed():
    assert changed_options(Config()) == {}
    config = Config().with_options(dry_run=True, lr=0.3, schedule=(1, 2), data=Path("x"))
    assert changed_options(config) == {"data": "x", "lr": 0.3, "schedule": [1, 2]}


def test_an_evaluation_is_not_tried():
    with pytest.raises(ConfigError, match="--dry-run tries a training: leave out --evaluate"):
        Config().with_options(dry_run=True, evaluate=True)
