"""A checkpoint is there as a whole or not at all."""

from pathlib import Path

import pytest
import torch

from dcd.checkpoint_file import CheckpointError
from training import checkpoint

THIS = {"arch": "mobilenetv2_dcd", "num_classes": 10, "width_mult": 1.0, "fc_squeeze": 16}
STATE = {"architecture": THIS, "epoch": 0, "step": 0, "optimizer": {}, "model": {"w": torch.ones(3)}}


def saved(folder: Path, steps: int, keep: int = 2, **options) -> list[str]:
    """Write the checkpoints of so many steps; what was said of them."""
    said = []
    writer = checkpoint.CheckpointWriter(folder, keep, said.append)
    writer.prepare()
    for step in range(steps):
        writer.save({**STATE, "step": step, **options}, is_best=step == 1)
    writer.wait()
    return said


def steps_in(folder: Path) -> dict[str, int]:
    return {file.name: torch.load(file, weights_only=True)["step"] for file in sorted(folder.iterdir())}


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
    writer.save({**STATE, "model": {"w": weights}}, is_best=False)
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
