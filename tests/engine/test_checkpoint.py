"""A checkpoint is there as a whole or not at all."""

import pytest
import torch

from dcd.checkpoint_file import CheckpointError
from dcd.engine import checkpoint

STATE = {"arch": "resnet18", "num_classes": 10, "step": 0, "optimizer": {}, "model": {"w": torch.ones(3)}}


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoints" / "last.pth"
    checkpoint.save(STATE, path)
    assert torch.equal(checkpoint.load(path, "resnet18", 10)["model"]["w"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.pth"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save(STATE, path)

    class Unwritable:
        def __reduce__(self):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.save({**STATE, "more": Unwritable()}, path)
    assert checkpoint.load(path, "resnet18", 10)["step"] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({**STATE, "arch": "resnet50"}, "holds resnet50 with 10 classes, this run is resnet18 with 10"),
        ({**STATE, "num_classes": 5}, "holds resnet18 with 5 classes"),
        ({"state_dict": {}}, "not a checkpoint of this trainer: give it to --weight"),
    ],
)
def test_foreign_checkpoints(tmp_path, state, message):
    checkpoint.save(state, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "last.pth", "resnet18", 10)
