"""A checkpoint is there as a whole or not at all."""

from pathlib import Path

import pytest
import torch

from dcd.checkpoint_file import CheckpointError
from training import checkpoint

THIS = {"arch": "mobilenetv2_dcd", "num_classes": 10, "width_mult": 1.0, "fc_squeeze": 16}
MODEL = {**dict.fromkeys(checkpoint.OF_THE_MODEL), "architecture": THIS, "model": {"w": torch.ones(3)}}
STATE = {**MODEL, "epoch": 0, "step": 0, "optimizer": {}}


def saved(folder: Path, steps: int, keep: int = 2, **options) -> list[str]:
    """Write the checkpoints of so many steps; what was said of them."""
    said = []
    writer = checkpoint.CheckpointWriter(folder, keep, said.append)
    writer.prepare()
    for step in range(steps):
        writer.save({**STATE, "step": step, "best_top1": step, **options}, best="model" if step == 1 else None)
    writer.wait()
    return said


def steps_in(folder: Path) -> dict[str, int]:
    """Of every file; best.pth does not say it, but has the best top-1 of that step."""
    found = {file.name: torch.load(file, weights_only=True) for file in sorted(folder.iterdir())}
    return {name: state["best_top1"] if name == "best.pth" else state["step"] for name, state in found.items()}


def test_generations(tmp_path):
    """The newest and those before it, the best one, and nothing else."""
    assert saved(tmp_path / "c", steps=5, keep=3) == []
    assert steps_in(tmp_path / "c") == {"best.pth": 1, "last.1.pth": 3, "last.2.pth": 2, "last.pth": 4}
    state, path = checkpoint.load_newest(tmp_path / "c", THIS, pytest.fail)
    assert (state["step"], path.name) == (4, "last.pth") and torch.equal(state["model"]["w"], torch.ones(3))
    assert checkpoint.load_newest(tmp_path, THIS, pytest.fail) is None


def test_training_may_go_on_while_a_checkpoint_is_written(tmp_path):
    """What is written is the state at the time of the call."""
    writer = checkpoint.CheckpointWriter(tmp_path, 1, pytest.fail)
    weights = torch.zeros(1_000_000)
    writer.save({**STATE, "model": {"w": weights}})
    weights += 1
    writer.wait()
    assert not checkpoint.load(tmp_path / "last.pth", THIS)["model"]["w"].any()


def test_a_failed_write_leaves_the_old_files(tmp_path):
    class Unwritable:
        def __reduce__(self):
            raise OSError("no space left on device")

    saved(tmp_path, steps=2)
    before = steps_in(tmp_path)
    (said,) = saved(tmp_path, steps=1, more=Unwritable())
    assert "no checkpoint of epoch 1, step 0 could be written (no space left on device); training goes on" in said
    assert steps_in(tmp_path) == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path):
    saved(tmp_path, steps=2)
    content = (tmp_path / "last.pth").read_bytes()
    (tmp_path / "last.pth").write_bytes(content[: len(content) // 2])
    said = []
    state, path = checkpoint.load_newest(tmp_path, THIS, said.append)
    assert (state["step"], path.name) == (0, "last.1.pth")
    assert len(said) == 1 and str(tmp_path / "last.pth") in said[0]
    (tmp_path / "last.1.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is whole"):
        checkpoint.load_newest(tmp_path, THIS, said.append)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {**STATE, "architecture": {"arch": "resnet50", "num_classes": 10}},
            r"holds resnet50 \(num_classes 10\), this run is mobilenetv2_dcd \(num_classes 10, width_mult 1.0, fc_sq",
        ),
        ({**STATE, "architecture": {**THIS, "num_classes": 5}}, r"holds mobilenetv2_dcd \(num_classes 5,"),
        ({**STATE, "architecture": {**THIS, "width_mult": 0.5}}, "width_mult 0.5"),
        ({"state_dict": {}}, "not a checkpoint of this trainer: give it to --weight"),
    ],
)
def test_foreign_checkpoints(tmp_path, state, message):
    checkpoint.write_file(state, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "last.pth", THIS)


def test_a_fault_in_the_thread_that_writes_ends_the_run(tmp_path):
    """What is no failure of the disk is not passed over as one."""
    writer = checkpoint.CheckpointWriter(tmp_path, 1, pytest.fail)
    writer.save({**STATE, "more": lambda: None})
    with pytest.raises(Exception, match="pickle"):
        writer.wait()
