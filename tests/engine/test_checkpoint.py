"""A checkpoint is there as a whole or not at all."""

import pytest
import torch

from dcd.checkpoint_file import CheckpointError
from dcd.engine import checkpoint

THIS = {"arch": "mobilenetv2_dcd", "num_classes": 10, "width_mult": 1.0, "fc_squeeze": 16}
STATE = {"architecture": THIS, "step": 0, "optimizer": {}, "model": {"w": torch.ones(3)}}


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoints" / "last.pth"
    checkpoint.save(STATE, path)
    assert torch.equal(checkpoint.load(path, THIS)["model"]["w"], torch.ones(3))
    assert [file.name for file in path.parent.iterdir()] == ["last.pth"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pth"
    checkpoint.save(STATE, path)

    class Unwritable:
        def __reduce__(self):
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        checkpoint.save({**STATE, "more": Unwritable()}, path)
    assert checkpoint.load(path, THIS)["step"] == 0
    assert [file.name for file in tmp_path.iterdir()] == ["last.pth"]


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
    checkpoint.save(state, tmp_path / "last.pth")
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(tmp_path / "last.pth", THIS)
