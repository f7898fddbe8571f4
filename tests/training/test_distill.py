"""Distillation: the losses by their equations, the teacher, and what is said of one that does not fit."""

import copy
import math
import sys

import pytest
import torch

import dcd
from tests.helpers import build_trainer, difference, last, whole_and_gone_on
from tests.training.test_step_graph import WARM_UP, train
from training import step_graph
from training.classes import Classes
from training.distill import distillation_loss, load_teacher
from training.options import ConfigError, DistillConfig

FIVE = Classes(5)


@pytest.fixture
def teacher(tmp_path) -> dict:
    """The options of a teacher of five classes."""
    torch.manual_seed(7)
    state = dcd.create_model("mobilenetv2", 5, width_mult=1.0).state_dict()
    torch.save({"state_dict": state}, tmp_path / "teacher.pth")
    return {"teacher": "mobilenetv2", "teacher_weight": tmp_path / "teacher.pth"}


def test_the_soft_loss_is_that_of_hinton():
    torch.manual_seed(0)
    logits, taught, loss = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5), torch.tensor(2.0)
    found = distillation_loss(loss, logits, taught, DistillConfig(distill_alpha=0.25, distill_temperature=4.0))
    p, q = (taught / 4).softmax(1).double(), (logits / 4).softmax(1).double()
    divergence = (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(found.double(), 0.75 * loss + 0.25 * 16 * divergence, rtol=1e-5, atol=1e-6)
    # Hinton et al., eq. 2: the gradient is that of the probabilities, (q - p) / T, times T² over the images.
    (gradient,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(gradient.double(), 0.25 * 4 * (q - p) / 4, rtol=1e-4, atol=1e-6)


def test_the_hard_loss_is_that_of_deit():
    logits, taught = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), torch.tensor([[0.1, 0.2, 0.0], [0.0, 9.0, 1.0]])
    found = distillation_loss(torch.tensor(3.0), logits, taught, DistillConfig(distill="hard", distill_alpha=0.5))
    by_class = [math.log(math.exp(2) + 2) - 0, math.log(math.e + 2) - 1]
    assert found.item() == pytest.approx(0.5 * 3 + 0.5 * sum(by_class) / 2, rel=1e-6)


@pytest.mark.parametrize("options", [{"distill": "soft"}, {"distill": "hard", "amp": "bf16", "mixup": 0.5}])
def test_the_teacher_sees_the_same_images_and_stays_as_it_is(tmp_path, teacher, options):
    trainer = build_trainer(tmp_path, **teacher, **options, accumulate=2, mixup_epochs=1)
    trainer.progress.epoch = 1  # mixup begins after epoch 0
    step, seen = trainer.train_step, {"teacher": [], "student": []}
    before = copy.deepcopy(step._teacher.state_dict())
    step._teacher.register_forward_pre_hook(lambda module, inputs: seen["teacher"].append(inputs[0]))
    trainer.model.register_forward_pre_hook(lambda module, inputs: seen["student"].append(inputs[0]))
    trainer.train_epoch()
    assert len(seen["teacher"]) == 8
    assert all(a is b for a, b in zip(seen["teacher"], seen["student"], strict=True))
    assert difference(dict(step._teacher.state_dict()), dict(before)) == []
    assert not any(p.requires_grad or p.grad is not None for p in step._teacher.parameters())
    assert not any(module.training for module in step._teacher.modules())


@pytest.mark.parametrize("distill", ["soft", "hard"])
def test_the_student_learns_what_the_teacher_says(tmp_path, teacher, distill):
    trainer = build_trainer(tmp_path, **teacher, distill=distill, distill_alpha=1.0, lr=0.002)
    step = trainer.train_step
    step.begin_epoch()
    batch = next(iter(trainer.loader))
    losses = []
    for _ in range(40):
        step(batch, trainer.progress)
        losses.append(step.metrics.reduce().loss)
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]  # a fifth or less with AVX2 and AVX-512, of a curve with bumps


def test_a_run_with_a_teacher_goes_on_exactly_and_its_checkpoint_has_no_teacher(tmp_path, teacher):
    whole, second = whole_and_gone_on(tmp_path, **teacher)
    assert difference(second.train_step.state_dict(), whole.train_step.state_dict()) == []
    alone = build_trainer(tmp_path)
    alone.saver.resume(last(tmp_path))
    assert alone.train_step.state_dict().keys() == whole.train_step.state_dict().keys()
    alone.train_epoch()
    assert difference(alone.train_step.state_dict(), whole.train_step.state_dict()) != []


def test_a_recorded_step_is_an_ordinary_one(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr(step_graph, "WARM_UP", WARM_UP)
    wanted, wanted_sums, _ = train(tmp_path / "ordinary", WARM_UP + 2, False, **teacher)
    found, found_sums, replays = train(tmp_path / "replayed", WARM_UP + 2, True, **teacher)
    assert replays == 2 and difference(found, wanted) == [] and difference(found_sums, wanted_sums) == []


def test_a_teacher_of_timm(tmp_path):
    import timm

    torch.manual_seed(3)
    theirs = timm.create_model("resnet10t", num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    config = DistillConfig(teacher="timm/resnet10t", teacher_weight=tmp_path / "timm.pth")
    found, images = load_teacher(config, FIVE), torch.randn(2, 3, 64, 64)
    assert torch.equal(found(images), theirs.eval()(images))
    with pytest.raises(
        ConfigError, match="resnet10t with the 6 classes of this run does not fit .*timm.pth: .*mismatch"
    ):
        load_teacher(config, Classes(6))


def said(config: DistillConfig, classes: Classes = FIVE) -> str:
    with pytest.raises(ConfigError) as error:
        load_teacher(config, classes)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_said_of_a_teacher_that_does_not_fit(tmp_path, teacher, monkeypatch):
    path = teacher["teacher_weight"]
    assert f"{path} has 5 classes, this run has 6: a teacher must know the same" in said(
        DistillConfig(**teacher), Classes(6)
    )
    named = torch.load(path, weights_only=True)
    torch.save({**named, "classes": list("abcde")}, path)
    assert "other classes than this run, or in another order" in said(
        DistillConfig(**teacher), Classes(5, list("bacde"))
    )
    assert load_teacher(DistillConfig(**teacher), Classes(5, list("abcde"))) is not None
    assert "--teacher: unknown model 'mobilenet'; did you mean mobilenetv2" in said(DistillConfig("mobilenet", path))
    assert f"--teacher resnet18: {path} does not fit this model" in said(DistillConfig("resnet18", path))
    assert "timm has no such model; did you mean timm/resnet18" in said(DistillConfig("timm/resnet1", path))
    assert "nowhere.pth: no such file" in said(DistillConfig("timm/resnet18", tmp_path / "nowhere.pth"))
    import timm

    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), path)
    assert "a mean of (0.5, 0.5, 0.5), not by ImageNet's" in said(DistillConfig("timm/test_resnet", path))
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "--teacher timm/resnet18 is timm's: pip install 'timm>=" in said(DistillConfig("timm/resnet18", path))


@pytest.mark.parametrize(
    "options", [{"teacher": "resnet18"}, {"distill_alpha": 1.5}, {"distill_alpha": -0.1}, {"distill_temperature": 0.0}]
)
def test_values_that_no_run_takes(options):
    with pytest.raises(ConfigError, match="--(teacher-weight|distill-alpha|distill-temperature)"):
        DistillConfig(**options)
