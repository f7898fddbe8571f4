"""`--profile N` in real runs: the same weights, bit for bit, and what bounds the run beside them."""

import json
from pathlib import Path

import pytest

from tests.helpers import CPU, SMALL, build_trainer, difference, last, lines, read, run
from training.options import ConfigError
from training.profile.run_profile import RunProfile
from training.profile.verdict import Setting
from training.trainer import Trainer

SETTING = Setting("cpu", 2, 2, 1, "synthetic", converted=False, exact_decode=False, mixed=False, compiled=False)


def check(found: dict, images: int, steps: int) -> None:
    """`profile.json` of a run on data that cost nothing."""
    step = found["train_step"]
    assert step["steps"] == steps and sum(step["shares"].values()) == pytest.approx(1)
    assert found["images_per_sec"] == pytest.approx(images / step["step_time_ms"] * 1000)
    assert step["shares"]["forward"] > 0.1 and step["shares"]["backward"] > 0.1 and step["shares"]["optimizer"] > 0
    assert found["bound"] and "what would help: " in found["verdict"]


def test_a_profiled_run_gets_the_same_weights(tmp_path):
    """Two ranks, with everything random; of 17 steps 10 pass, 2 are timed, 4 traced, one follows."""
    images = ["--backend", "synthetic", "--synthetic-images", 17 * 12, "--num-classes", 3]
    common = [*SMALL, *images, "-b", 12, "--epochs", 1]
    everything = ["--dropout", 0.2, "--ema", 0.9, "--clip-grad", 1.0]
    run(*common, *everything, "-c", tmp_path / "without", ranks=2)
    output = run(*common, *everything, "-c", tmp_path / "with", "--profile", 2, ranks=2)
    states = [last(tmp_path / name) for name in ("with", "without")]
    assert [state.pop("config")["profile"] for state in states] == [2, None]
    assert difference(*states) == []
    losses = [[line["loss"] for line in lines(tmp_path / name, "train")] for name in ("with", "without")]
    assert losses[0] == losses[1]

    found = read(tmp_path / "with", "profile.json")
    check(found, images=12, steps=2)
    assert found["world_size"] == 2 and 0 < found["train_step"]["shares"]["reduce"] < 1
    assert output.count(found["verdict"]) == 1 and output.count("profile: ") == 2, "rank 0 says it, once"
    names = [event["name"] for event in json.loads((tmp_path / "with" / "trace.json").read_text())["traceEvents"]]
    assert names.count("data") == names.count("forward") == 3


def profiled(folder: Path, steps: int, stop_after_steps: int, accumulate: int = 1) -> Trainer:
    """A trainer that has done so many steps, `steps` of them to be timed, and its profile closed."""
    options = {"profile": steps, "stop_after_steps": stop_after_steps, "accumulate": accumulate, "lr": 0.001}
    trainer = build_trainer(folder, images=16 * 40, **options)
    listener = RunProfile(trainer.config, CPU, trainer.model, SETTING, trainer.log)
    trainer.train_epoch(listener)
    listener.close()
    assert trainer.stopped and trainer.progress.step == stop_after_steps
    return trainer


def test_a_run_that_ends_early_tells_what_it_has(tmp_path, capsys):
    profiled(tmp_path, steps=20, stop_after_steps=14)
    check(read(tmp_path, "profile.json"), images=16, steps=4)
    assert not (tmp_path / "trace.json").exists() and capsys.readouterr().out.count("profile: ") == 2

    profiled(tmp_path / "sooner", steps=20, stop_after_steps=5)
    assert "--profile: the run has ended within the 10 steps before those that are timed" in capsys.readouterr().out
    assert not (tmp_path / "sooner" / "profile.json").exists()


def test_afterwards_nobody_listens(tmp_path, capsys):
    """The profile is of the steps that were asked for, and leaves no hooks behind."""
    trainer = profiled(tmp_path, steps=1, stop_after_steps=16, accumulate=2)
    check(read(tmp_path, "profile.json"), images=16, steps=1)
    assert capsys.readouterr().out.count("profile: ") == 2 and (tmp_path / "trace.json").exists()
    assert not any(parameter._post_accumulate_grad_hooks for parameter in trainer.model.parameters())


def test_no_steps_are_no_profile(tmp_path):
    with pytest.raises(ConfigError, match="--profile 0: must be at least 1"):
        build_trainer(tmp_path, profile=0)
