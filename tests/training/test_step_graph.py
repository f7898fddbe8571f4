"""Steps of --cuda-graphs. Without a GPU, what a CUDA graph does is done by a recorder of operations: it repeats them on
the same memory, with the same numbers from the host, and allows no read of a value."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from tests.helpers import build_trainer, difference
from training import step_graph
from training.step_graph import StepGraph
from training.train_step import TrainStep

WARM_UP = 2


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch):
    monkeypatch.setattr(step_graph, "WARM_UP", WARM_UP)


class Operations(TorchDispatchMode):
    """A `Recorder` on the CPU. It carries the operations out as it records them, and puts back what they changed."""

    def __init__(self, *changed: torch.Tensor):
        super().__init__()
        self.calls, self._changed, self.on_host = [], changed, None

    @contextmanager
    def record(self) -> Iterator[None]:
        before = [tensor.clone() for tensor in self._changed]
        try:
            with self, torch.random.fork_rng(devices=[]):
                yield
        finally:
            for tensor, value in zip(self._changed, before, strict=True):
                tensor.copy_(value)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0] is not self.on_host:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            memory = {id(leaf) for leaf in tree_leaves((args, kwargs))}
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                is_fresh = isinstance(old, torch.Tensor) and id(old) not in memory
                if is_fresh and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


class Passive(TorchDispatchMode):
    """Has operations take the way on which they can be recorded: the last bits of some are others there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def numbers_of(step: TrainStep) -> list[torch.Tensor]:
    """All that a step changes."""
    leaves = [leaf for leaf in tree_leaves(step.state_dict()) if isinstance(leaf, torch.Tensor)]
    scaler = [step.scaler._scale, step.scaler._growth_tracker] if step.scaler.is_enabled() else []
    return [*leaves, *scaler, step.metrics._sums, *step.safe._before]


def recorder_of(step: TrainStep) -> Operations:
    """For this step; on a GPU, too, the count of an average is on the host."""
    operations = Operations(*numbers_of(step))
    operations.on_host = step.ema and step.ema.n_averaged
    return operations


def train(folder, steps: int, replayed: bool, **options) -> tuple[dict, dict, int]:
    """After some steps of different batches, learning rates and shares: the state, the sums, how many were replayed."""
    config = {"images": 16 * steps, "print_freq": 1000, "lr": 0.01, "lr_decay": "cos", "epochs": 3}
    trainer = build_trainer(folder, **{**config, **options})
    step, progress, count = trainer.train_step, trainer.progress, 0

    def counted() -> Operations:
        operations = recorder_of(step)
        replay = operations.replay

        def replay_and_count() -> None:
            nonlocal count
            count += 1
            replay()

        operations.replay = replay_and_count
        return operations

    if replayed:
        step.record(counted, pytest.fail)
    progress.epoch = 1
    step.begin_epoch()
    records = []
    with Passive():
        for progress.step, batch in enumerate(trainer.loader):
            records.append(step(batch, progress))
    sums = {"sums": step.metrics._sums, "skipped": torch.stack([record.skipped for record in records])}
    return step.state_dict(), {**sums, "finite": torch.stack([record.finite for record in records])}, count


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup": 0.5, "mixup_epochs": 1, "ema": 0.9, "clip_grad": 1.0},
        {"accumulate": 2, "dropout": 0.2, "norm_decay": False, "label_smoothing": 0.1},
        {"amp": "fp16", "clip_grad": 1.0},
        {"cutmix": 1.0, "accumulate": 2},
        {"amp": "bf16", "cutmix": 1.0, "mixup": 0.5, "mixup_epochs": 1},
        {"optimizer": "adamw", "norm_decay": False},
        {"optimizer": "lamb", "amp": "fp16"},
        {"optimizer": "lars", "clip_grad": 1.0},
    ],
)
def test_replayed_steps_are_ordinary_ones_bit_for_bit(tmp_path, options):
    steps = WARM_UP + 2  # the second replay follows a replay
    wanted, wanted_sums, none = train(tmp_path / "ordinary", steps, False, **options)
    found, found_sums, replays = train(tmp_path / "replayed", steps, True, **options)
    assert (none, replays) == (0, 2)
    assert difference(found, wanted) == [] and difference(found_sums, wanted_sums) == []


def test_what_cannot_be_recorded_is_said_and_done_step_by_step(tmp_path):
    class Reading(torch.nn.Module):
        def forward(self, x):
            return x * (2.0 if x.sum().item() > 1e9 else 1.0)

    said, steps = [], WARM_UP + 2
    states = []
    for name in ("ordinary", "refused"):
        trainer = build_trainer(tmp_path / name, images=16 * steps, print_freq=1000, amp="fp16", ema=0.9)
        trainer.model.blocks.append(Reading())
        if name == "refused":
            trainer.train_step.record(partial(recorder_of, trainer.train_step), said.append)
        trainer.train_step.begin_epoch()
        for number, batch in enumerate(trainer.loader):
            trainer.progress.step = number
            trainer.train_step(batch, trainer.progress)
        states.append(trainer.train_step.state_dict())
    assert difference(states[1], states[0]) == []
    assert said == [
        "--cuda-graphs: a step of this run cannot be recorded, and is not replayed: "
        "operation not permitted when stream is capturing"
    ]


def test_it_is_recorded_anew_for_another_size_of_a_batch():
    recorders = []

    def recorder() -> Operations:
        recorders.append(Operations())
        return recorders[-1]

    graph = StepGraph(lambda images, labels: (images.sum() + labels.sum(),), pytest.fail, pytest.fail, None, recorder)
    for size in (4, 5):
        for step in range(WARM_UP + 3):
            (found,) = graph(torch.full((size, 3), float(step)), torch.ones(size))
            assert found == 3 * size * step + size
    assert len(recorders) == 2


def test_without_a_gpu_the_run_says_so(tmp_path, capsys):
    trainer = build_trainer(tmp_path, cuda_graphs=True)
    assert trainer.train_step._graph is None
    assert capsys.readouterr().out == "--cuda-graphs: there is no GPU here, and no step is recorded\n"
