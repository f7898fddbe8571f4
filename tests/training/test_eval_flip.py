"""--eval-flip: the mean of the logits of each image and its mirror image, and where it is said."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pipelines.batch import Batch
from tests.helpers import SMALL, build_trainer, lines, read


@pytest.fixture
def trainer(tmp_path):
    """Of a model whose evaluations are finite, on 40 synthetic images, 4 to evaluate."""
    trainer = build_trainer(tmp_path, images=40, eval_flip=True, compile=True, ema=0.9, lr=0.01)
    for module in trainer.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        trainer.model(torch.randn(16, 3, 32, 32))
    return trainer


def batches(mirrored: bool = False) -> list[Batch]:
    """A full one, and one with three images: with --compile it is filled up."""
    generator, made = torch.Generator().manual_seed(1), []
    for count in (8, 3):
        images = torch.randn(count, 3, 32, 32, generator=generator).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(5, (count,), generator=generator)
        made.append(Batch(images.flip(3) if mirrored else images, labels, torch.arange(count)))
    return made


def test_it_is_the_mean_of_both(trainer):
    model, logits, labels = trainer.model.eval(), [], []
    with torch.no_grad():
        for images, labels_of, _ in batches():
            logits.append((model(images) + model(images.flip(3))) / 2)
            assert not torch.allclose(model(images), model(images.flip(3)), rtol=1e-2)
            labels.append(labels_of)
    logits, labels = torch.cat(logits), torch.cat(labels)
    right = (logits.argmax(1) == labels).sum().item()
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    found = trainer.evaluator.evaluate(batches=batches())
    assert found.flipped and found.images == 11 and found.top1 == pytest.approx(100 * right / 11)
    assert found.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    # What is compiled is compiled for one size and one layout.
    assert {(images.shape, images.stride()) for images in seen} == {((8, 3, 32, 32), seen[0].stride())}
    assert len(seen) == 4 and seen[0].is_contiguous(memory_format=torch.channels_last)


def test_mirrored_data_give_the_same_numbers(trainer):
    found, mirrored = (trainer.evaluator.evaluate(batches=batches(which)) for which in (False, True))
    assert found == mirrored


def test_an_image_whose_mirror_image_is_not_finite_counts_as_wrong(trainer):
    assert trainer.evaluator.evaluate(batches=batches()).not_finite == 0
    calls = []

    def spoil_the_second(module, inputs, logits):
        calls.append(module)
        return logits.fill_(torch.inf) if len(calls) == 2 else logits

    trainer.model.register_forward_hook(spoil_the_second)
    assert trainer.evaluator.evaluate(batches=batches()).not_finite == 8


def test_a_training_says_so(trainer, tmp_path, capsys):
    trainer.evaluate_epoch()
    trainer.end_epoch()
    assert {kind: result.flipped for kind, result in trainer.results.items()} == {"eval": True, "eval_ema": True}
    assert capsys.readouterr().out.count("(4 images, each with its mirror image)") == 2
    assert [line["flipped"] for kind in ("eval", "eval_ema") for line in lines(tmp_path, kind)] == [True, True]
    assert trainer.summary()["eval"]["flipped"] is True


@pytest.mark.parametrize(
    "flags, said", [([], "(6 images)"), (["--eval-flip"], "(6 images, each with its mirror image)")]
)
def test_an_evaluation_says_so(tmp_path, main, flags, said):
    trainer = build_trainer(tmp_path)
    trainer.saver.save()
    trainer.saver.finish()
    data = ["--backend", "synthetic", "--synthetic-images", "60", "-b", "16", "--device", "cpu"]
    assert said in main(*SMALL, *data, "-c", tmp_path, "--evaluate", "--weight", trainer.saver.path(), *flags)
    written = read(tmp_path, "evaluation.json")
    assert written["result"]["flipped"] == written["config"]["eval_flip"] == bool(flags)
