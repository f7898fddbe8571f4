"""The training step: nothing in it waits for the device, and one batch is learnt by heart."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dcd
from dcd.checkpoint_file import CheckpointError
from pipelines.build import build_loader
from pipelines.config import AugmentationConfig, DataConfig
from tests.helpers import CPU, build_trainer, whole_and_gone_on
from training.config import Config
from training.evaluator import Evaluator
from training.lockstep import Lockstep
from training.options import ConfigError
from training.run_log import RunLog
from training.saver import DivergedError
from training.trainer import Trainer


class Synchronisations(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host, each of which would wait for a GPU.

    Args:
        on_host: a tensor that lies on the CPU on every device; its reads are left out.
    """

    def __init__(self, on_host: torch.Tensor | None = None):
        super().__init__()
        self.count, self._on_host = 0, None if on_host is None else on_host.data_ptr()

    def __enter__(self):
        # Of a tensor on a CPU this calls no operation.
        self._tolist = torch.Tensor.tolist
        torch.Tensor.tolist = self._counted_tolist(self._tolist)
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.tolist = self._tolist
        return super().__exit__(*error)

    def _counted_tolist(self, tolist):
        def counted(tensor):
            self.count += 1
            return tolist(tensor)

        return counted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            self.count += args[0].data_ptr() != self._on_host
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup": 0.5, "mixup_epochs": 1, "ema": 0.9, "clip_grad": 1.0},
        {"mixup": 0.5, "mixup_epochs": 1, "cutmix": 1.0},
    ],
)
def test_no_synchronisation_between_lines_of_the_log(tmp_path, options):
    trainer = build_trainer(tmp_path, images=32 * 16, print_freq=10, **options)
    trainer.progress.epoch = 1  # mixup begins after epoch 0
    trainer.train_step.begin_epoch()
    batch = next(iter(trainer.loader))
    average = trainer.train_step.ema
    with Synchronisations(on_host=average and average.n_averaged) as found:
        for _ in range(3):
            trainer.train_step(batch, trainer.progress)
    assert found.count == 0
    with Synchronisations() as found:
        torch.ones(1).item()
    assert found.count == 1, "the counter counts"


def test_the_log_is_all_that_reads_values(tmp_path):
    """A longer epoch with the same number of lines in the log has as many synchronisations."""
    counts = []
    for steps in (4, 8):
        trainer = build_trainer(tmp_path / str(steps), images=16 * steps, print_freq=steps)
        with Synchronisations() as found:
            trainer.train_epoch()
        counts.append(found.count)
    assert counts[0] == counts[1] > 0


def test_one_batch_is_overfitted(digits, tmp_path):
    """Real images, one batch, the whole loop: after 24 steps it knows them by heart."""
    for folder in (digits / "train").iterdir():
        for split, image in zip(("train", "train", "val"), sorted(folder.iterdir()), strict=False):
            target = tmp_path / split / folder.name
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, target)
    options = {"epochs": 24, "lr": 0.02, "lr_decay": "cos", "amp": "off"}
    config = Config().with_options(
        arch="resnet18_dcd", num_classes=10, batch_size=20, checkpoint=tmp_path / "out", **options
    )
    whole = AugmentationConfig(crop_area=(1, 1), crop_ratio=(1, 1), flip=0, eval_crop=1)
    data = DataConfig(root=tmp_path, batch_size=20, input_size=32, workers=0)
    torch.manual_seed(0)
    model = dcd.create_model("resnet18_dcd", 10).to(memory_format=torch.channels_last)
    train_loader, eval_loader = (build_loader(data, split, augmentation=whole) for split in ("train", "val"))
    log = RunLog(tmp_path / "out", enabled=True)
    evaluator = Evaluator(config, CPU, model, eval_loader, Lockstep(CPU, config.run.timeout), log)
    trainer = Trainer(config, CPU, model, train_loader, evaluator, log)
    log.open({}, 0)
    for trainer.progress.epoch in range(24):
        trainer.progress.step = 0
        trainer.train_epoch()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] > 2 and losses[-1] < 0.05


def test_spoilt_weights_are_not_saved(tmp_path):
    trainer = build_trainer(tmp_path)
    trainer.saver.save()
    trainer.saver.finish()
    before = trainer.saver.path().read_bytes()
    trainer.progress.step += 1
    trainer.model.classifier.static_linear.bias.data[0] = float("inf")
    with pytest.raises(DivergedError, match="weights are not finite"):
        trainer.saver.save()
    with pytest.raises(DivergedError), trainer.saved_on_failure():
        raise ValueError("a damaged image, say")
    assert trainer.saver.path().read_bytes() == before


def spoil(trainer: Trainer, *calls: int) -> None:
    """Let images 1 and 3 of these batches, counted from 0, be no numbers."""
    count = itertools.count()

    def not_a_number(module, inputs):
        if next(count) in calls:
            images = inputs[0].clone()
            images[[1, 3]] = torch.nan
            return (images,)

    trainer.model.register_forward_pre_hook(not_a_number)


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_bad_steps_are_named_and_left_out(tmp_path, capfd, amp):
    """Up to --max-bad-steps: what is trained and saved stays finite."""
    trainer = build_trainer(tmp_path, images=16 * 8, print_freq=2, max_bad_steps=1, ema=0.9, lr=0.01, amp=amp)
    if amp == "fp16":  # below the scales of which the gradients of good batches are too high
        trainer.train_step.scaler.load_state_dict({**trainer.train_step.scaler.state_dict(), "scale": 16.0})
    spoil(trainer, 2, 7)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    with pytest.raises(
        DivergedError, match=r"the loss is nan at epoch 1, step 8 .synthetic image \d+, .* more.: use a"
    ):
        trainer.train_epoch()
    said = capfd.readouterr().err
    assert (
        "rank 0: warning: not finite at epoch 1, step 3 (synthetic image " in said and "1 of --max-bad-steps 1" in said
    )
    assert trainer.progress.bad_steps == 2 and trainer.skipped_steps == 2
    assert not any(torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    for model in (trainer.model, trainer.train_step.ema.module):
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert losses[1] is None and None not in (losses[0], losses[2])
    # The statistics are those of the last good line of the log, which was the third.
    trainer.train_step.safe.restore_statistics()
    trainer.saver.save()


def test_an_evaluation_without_numbers_is_never_the_best(tmp_path, capsys):
    trainer = build_trainer(tmp_path)
    with torch.no_grad():  # so that all labels are right, were it not for the numbers
        trainer.model.classifier.static_linear.bias[0] = 1e4
    spoil(trainer, 0)
    trainer.evaluate_epoch()
    trainer.end_epoch()
    trainer.saver.finish()
    result = trainer.results["eval"]
    assert result.not_finite == 2 and result.images == 6 and trainer.progress.best_top1 == -1
    assert not trainer.saver.path("best.pth").exists() and trainer.saver.path().exists()
    assert "2 of 6 images have logits that are no finite numbers" in capsys.readouterr().out
    trainer.log.close(trainer.summary())
    for file in ("summary.json", "metrics.jsonl"):
        assert '"loss": null' in (tmp_path / file).read_text()


def test_a_full_disk_stops_no_training(tmp_path, capsys):
    """What cannot be written to the log is counted, and said once and at the end."""
    trainer = build_trainer(tmp_path, images=16 * 3, print_freq=1)
    trainer.log._metrics = open("/dev/full", "ab", buffering=0)  # noqa: SIM115  (the log closes it)
    trainer.train_epoch()
    trainer.log.close()
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 1 and "3 writes to" in said and trainer.progress.step == 3


def test_a_step_that_breaks_off_is_undone(tmp_path):
    """What is saved then is the state from before it: also of the batch norms, which had seen its images."""
    trainer = build_trainer(tmp_path, images=16 * 4)
    before = {name: values.clone() for name, values in trainer.model.state_dict().items()}

    def fail(*_):
        raise RuntimeError("out of memory")

    hook = trainer.model.classifier.register_full_backward_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"), trainer.saved_on_failure():
        trainer.train_epoch()
    hook.remove()
    saved = torch.load(trainer.saver.path(), weights_only=True)
    assert (saved["epoch"], saved["step"]) == (0, 0)
    assert [name for name, values in before.items() if not torch.equal(saved["model"][name], values)] == []


def test_going_on_with_other_options(tmp_path):
    """What is chosen on the command line holds; what cannot be gone on with is said."""
    first = build_trainer(tmp_path, images=16 * 4, wd=1e-4)
    first.progress.epoch, first.progress.step = 1, 2
    first.saver.save()
    first.saver.finish()
    state = torch.load(first.saver.path(), weights_only=True)

    second = build_trainer(tmp_path, images=16 * 4, wd=5e-5, amp="fp16", ema=0.9)
    second.saver.resume(state)
    progress = second.progress
    assert (progress.epoch, progress.step, progress.global_step) == (1, 2, 6)
    assert second.train_step.optimizer.param_groups[0]["weight_decay"] == 5e-5
    average, weights = second.train_step.ema.module.state_dict(), second.model.state_dict()
    assert all(torch.equal(average[name], weights[name]) for name in weights), "an --ema that is new begins with them"
    assert second.train_step.ema.n_averaged == 1

    with pytest.raises(
        ConfigError,
        match="epoch of 4 steps with --seed 0 and --repeats 1, this run has 4 steps, --seed 1 and --repeats 1",
    ):
        build_trainer(tmp_path, images=16 * 4, seed=1).saver.resume(state)
    with pytest.raises(CheckpointError, match="of other training images .64 there, 80 here.: use the same data"):
        build_trainer(tmp_path, images=16 * 5).saver.resume(state)
    with pytest.raises(ConfigError, match="the checkpoint is of --optimizer lamb, this run has sgd: use the same"):
        build_trainer(tmp_path, images=16 * 4).saver.resume({**state, "optimizer_name": "lamb"})
    older = {name: value for name, value in state.items() if name not in ("optimizer_name", "bad_steps")}
    build_trainer(tmp_path, images=16 * 4).saver.resume(older)
    with pytest.raises(ConfigError, match="was it --no-norm-decay"):
        build_trainer(tmp_path, images=16 * 4, norm_decay=False).saver.resume(state)


def test_a_frozen_run_goes_on_exactly(tmp_path):
    """Stopped after two of four steps: the same classifier, by an optimizer that knows of nothing else."""
    options = {"images": 16 * 4, "freeze": True, "weight": Path("given.pth"), "ema": 0.9, "clip_grad": 1.0}
    before = build_trainer(tmp_path, **options).model.state_dict()
    whole, second = whole_and_gone_on(tmp_path, **options)
    found, expected = second.model.state_dict(), whole.model.state_dict()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    changed = {name for name in expected if not torch.equal(before[name], expected[name])}
    assert changed == {name for name in expected if name.startswith("classifier.")}
    optimized = [parameter for group in whole.train_step.optimizer.param_groups for parameter in group["params"]]
    assert list(map(id, optimized)) == list(map(id, whole.model.classifier.parameters()))


def test_within_an_epoch_a_run_goes_on_with_its_own_repeats_alone(tmp_path):
    trainer = build_trainer(tmp_path / "once")
    trainer.progress.step = 1
    trainer.saver.save()
    trainer.saver.wait()
    state = torch.load(trainer.saver.path(), weights_only=True)
    twice = build_trainer(tmp_path / "twice", repeats=2)
    with pytest.raises(ConfigError, match="--seed 0 and --repeats 1, this run has 4 steps, --seed 0 and --repeats 2"):
        twice.saver.resume(state)
    twice.saver.resume({**state, "epoch": 1, "step": 0})
    assert (twice.progress.epoch, twice.progress.step) == (1, 0)
