"""--blur-pool: what a checkpoint remembers of it, and who refuses the other kind."""

import pytest
import torch

import dcd
from dcd.checkpoint_file import CheckpointError
from dcd.layers import BlurPool
from dcd.models.resnet import BasicBlock
from dcd.recomputing import checkpoint_blocks
from tests.dcd.test_blur_pool import shallow
from tests.helpers import difference
from tests.training.test_recomputing import step
from training import checkpoint
from training.build import open_evaluator, open_trainer
from training.classes import Classes
from training.config import Config
from training.distill import load_teacher
from training.options import DistillConfig

SIZES = {"arch": "resnet18", "num_classes": 5, "input_size": 32, "device": "cpu", "amp": "off"}
DATA = {"backend": "synthetic", "synthetic_images": 40, "batch_size": 16, "workers": 1}
WITH = "was trained with blur pooling, this model has none: use --blur-pool"
WITHOUT = "does not say that it was trained with blur pooling, which this model has: leave out --blur-pool .*--no-blur"


def config(folder, **options) -> Config:
    return Config().with_options(**SIZES, **DATA, checkpoint=folder, **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """The folder of a run without blur pooling, and of one with it, by whether it has it."""
    folders = {blur_pool: tmp_path_factory.mktemp(f"blur_{blur_pool}") for blur_pool in (False, True)}
    for blur_pool, folder in folders.items():
        with open_trainer(config(folder, blur_pool=blur_pool)) as trainer:
            trainer.saver.save()
            trainer.saver.finish()
    return folders


@pytest.mark.parametrize("blur_pool", [False, True])
def test_a_run_takes_its_own_kind_and_refuses_the_other(saved, tmp_path, blur_pool):
    own, other = (saved[kind] / "checkpoints" / "last.pth" for kind in (blur_pool, not blur_pool))
    model = config(tmp_path, blur_pool=blur_pool).model
    assert checkpoint.load(own, model.architecture)["epoch"] == 0
    with pytest.raises(CheckpointError, match=r"holds resnet18 \(.*, this run is resnet18 \(.*") as error:
        checkpoint.load(other, model.architecture)
    assert str(error.value).count("blur_pool True") == 1 and "\n" not in str(error.value)
    with open_evaluator(config(tmp_path, blur_pool=blur_pool, weight=own, evaluate=True)) as evaluator:
        assert any(isinstance(module, BlurPool) for module in evaluator.model.modules()) == blur_pool
    # neither evaluated, nor what a training starts from
    for open_run, evaluate in ((open_evaluator, True), (open_trainer, False)):
        refused = open_run(config(tmp_path, blur_pool=blur_pool, weight=other, evaluate=evaluate))
        with pytest.raises(CheckpointError, match=WITHOUT if blur_pool else WITH) as error, refused:
            pass
        assert "\n" not in str(error.value)


def test_a_checkpoint_without_it_is_as_it_was_before_there_was_the_option(saved):
    state = torch.load(saved[False] / "checkpoints" / "last.pth", weights_only=True)
    assert state["architecture"] == {"arch": "resnet18", "num_classes": 5}


def test_the_library_refuses_the_other_kind_and_leaves_the_model_as_it_was(saved, tmp_path):
    official = tmp_path / "official.pth.tar"
    torch.save({"state_dict": dcd.create_model("resnet18", 5).state_dict()}, official)
    own = saved[True] / "checkpoints" / "last.pth"
    for path, blur_pool, message, strict in ((official, True, WITHOUT, False), (own, False, WITH, True)):
        model = dcd.create_model("resnet18", 5, blur_pool=blur_pool)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=message):
            dcd.load_checkpoint(model, path, strict)
        assert difference(dict(model.state_dict()), before) == []


def test_a_teacher_is_built_as_its_checkpoint_says(saved):
    for blur_pool, folder in saved.items():
        path = folder / "checkpoints" / "last.pth"
        teacher = load_teacher(DistillConfig("resnet18", path), Classes(5))
        assert any(isinstance(module, BlurPool) for module in teacher.modules()) == blur_pool
        wanted = dcd.create_model("resnet18", 5, blur_pool=blur_pool).eval()
        dcd.load_checkpoint(wanted, path)
        images = torch.randn(2, 3, 64, 64)
        assert torch.equal(teacher(images), wanted(images))
    with pytest.raises(ValueError, match="--teacher mobilenetv2: .* is of arch resnet18, not mobilenetv2"):
        load_teacher(DistillConfig("mobilenetv2", path), Classes(5))


def test_recomputed_blocks_have_the_same_gradients():
    found = []
    for recomputed in (False, True):
        model = shallow(BasicBlock, dynamic=True)
        if recomputed:
            checkpoint_blocks(model)
        found.append(step(model, torch.bfloat16))
    for without, with_it in zip(*found, strict=True):
        assert difference(with_it, without) == []
