"""The trainer on a GPU: going on, waiting for nothing, NCCL, evaluation, torch.compile and CUDA graphs."""

import copy
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten

from training import checkpoint, step_graph
from training.build import open_trainer
from training.config import Config
from training.distributed import barrier, sum_over_ranks
from training.dry_run import dry_run
from training.evaluator import Evaluator
from training.lockstep import Lockstep
from training.run_log import RunLog
from training.trainer import Trainer

pytestmark = pytest.mark.gpu
EVERYTHING = {"dropout": 0.2, "mixup": 0.5, "mixup_epochs": 1, "cutmix": 1.0, "ema": 0.9, "clip_grad": 1.0}


class KeptLosses(RunLog):
    """Writes nothing, and keeps the losses of training."""

    def __init__(self):
        super().__init__(Path(), enabled=False)
        self.losses: list[float] = []

    def write(self, kind: str, global_step: int, **values: float) -> None:
        self.losses += [values["loss"]] if kind == "train" else []


@pytest.fixture(autouse=True)
def settings_restored():
    """Those that `open_trainer` makes for the process."""
    products, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn
    kept = cudnn.benchmark, cudnn.deterministic
    yield
    torch.set_float32_matmul_precision(products)
    cudnn.benchmark, cudnn.deterministic = kept


@contextmanager
def opened(folder: Path, **options):
    """A trainer on synthetic images of five classes, six steps in an epoch; it begins with epoch 1, as mixup does."""
    shape = {"arch": "mobilenetv2_dcd", "width_mult": 0.1, "fc_squeeze": 16, "num_classes": 5, "input_size": 32}
    data = {"backend": "synthetic", "synthetic_images": 96, "batch_size": 16}
    run = {"device": "cuda", "checkpoint": folder, "lr": 0.005, "epochs": 3}
    with open_trainer(Config().with_options(**{**shape, **data, **run, **options}), write_log=False) as trainer:
        trainer.progress.epoch = 1
        trainer.log = KeptLosses()
        yield trainer


def state_of(trainer: Trainer) -> list:
    """All numbers that training goes on from, and their names."""
    values, names = tree_flatten(trainer.train_step.state_dict())
    return [*values, names]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_a_resumed_run_has_the_state_that_was_saved_and_the_same_losses(tmp_path, amp):
    everything = {**EVERYTHING, "amp": amp, "print_freq": 1}
    with opened(tmp_path, stop_after_steps=3, **everything) as first, opened(tmp_path, **everything) as second:
        torch.backends.cudnn.deterministic = True  # most of what differs from run to run; not all
        first.train_epoch()
        assert first.stopped and first.progress.step == 3
        first.saver.save()
        first.saver.finish()
        second.saver.resume(checkpoint.load(second.saver.path(), second.config.model.architecture))
        assert (second.progress.epoch, second.progress.step) == (1, 3)
        for found, saved in zip(state_of(second), state_of(first), strict=True):
            assert torch.equal(found, saved) if isinstance(saved, torch.Tensor) else found == saved

        first.config = first.config.with_options(stop_after_steps=None)
        for trainer in (first, second):
            trainer.train_epoch()
        assert len(second.log.losses) == 3
        assert second.log.losses[0] == pytest.approx(first.log.losses[3], rel=1e-3)
        # The last bit of one weight moves a loss in bfloat16 by up to a tenth, as was seen on a CPU.
        assert second.log.losses == pytest.approx(first.log.losses[3:], rel=0.2)


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
@pytest.mark.parametrize("names", [(), ("mixup", "mixup_epochs", "cutmix", "clip_grad"), ("dropout", "ema")])
def test_the_host_does_not_wait_between_lines_of_the_log(tmp_path, amp, names):
    with opened(tmp_path, amp=amp, **{name: EVERYTHING[name] for name in names}) as trainer:
        trainer.train_step.begin_epoch()
        batch = next(iter(trainer.loader))
        for _ in range(2):  # what is kept on the device is copied there once
            trainer.train_step(batch, trainer.progress)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                trainer.train_step(batch, trainer.progress)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_nccl_and_ddp_on_one_rank(tmp_path, monkeypatch, exact_float32):
    """The gradients are those without DDP, and lie in memory as it wants them: it would warn of a copy."""
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "lo")  # there need not be a network
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    with opened(tmp_path, amp="off", lr=0.0) as plain:
        torch.set_float32_matmul_precision("highest")  # as before `open_trainer`
        device = plain.ranks.device
        dist.init_process_group(
            "cpu:gloo,cuda:nccl", f"file://{tmp_path}/store", rank=0, world_size=1, device_id=device
        )
        torch.set_warn_always(True)  # not once in a process
        try:
            several = replace(plain.ranks, world_size=2)  # for which the trainer takes DDP
            model = copy.deepcopy(plain.model)
            lockstep = Lockstep(plain.ranks, plain.config.run.timeout)
            evaluator = Evaluator(plain.config, several, model, plain.evaluator.loader, lockstep, plain.log)
            parallel = Trainer(plain.config, several, model, plain.loader, evaluator, plain.log)
            assert isinstance(parallel.train_step._parallel, DistributedDataParallel)
            batch = next(iter(plain.loader))
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                for trainer in (plain, parallel):
                    trainer.train_step.begin_epoch()
                    for _ in range(2):  # DDP lays out its buckets anew after the first
                        trainer.train_step(batch, trainer.progress)
            assert not [warning.message for warning in caught if "stride" in str(warning.message)]
            parameters = dict(plain.model.named_parameters())
            assert not [name for name, value in parameters.items() if value.grad.stride() != value.stride()]
            wanted, found = (
                torch.cat([value.grad.flatten() for value in trainer.model.parameters()])
                for trainer in (plain, parallel)
            )
            assert (found - wanted).norm() <= 0.01 * wanted.norm()
            assert sum_over_ranks(torch.full((2,), 3.0, device=device)).tolist() == [3, 3]
            barrier()
            assert evaluator.evaluate().images == 9  # with buffers shared before and sums after
        finally:
            torch.set_warn_always(False)
            dist.destroy_process_group()


def test_an_evaluation_comes_to_what_it_does_on_a_cpu(tmp_path, exact_float32):
    with (
        opened(tmp_path, amp="off", synthetic_images=640) as on_gpu,
        opened(tmp_path, amp="off", synthetic_images=640, device="cpu", lr=0.0) as on_cpu,
    ):
        torch.set_float32_matmul_precision("highest")  # as before `open_trainer`
        for module in on_cpu.model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 1.0
        # for its statistics: by fresh ones all images look alike
        on_cpu.train_step(next(iter(on_cpu.loader)), on_cpu.progress)
        on_gpu.model.load_state_dict(on_cpu.model.state_dict())
        found, wanted = on_gpu.evaluator.evaluate(), on_cpu.evaluator.evaluate()
        assert found.images == wanted.images == 64
        assert found.loss == pytest.approx(wanted.loss, rel=5e-4)
        assert (found.top1, found.top5) == (wanted.top1, wanted.top5)


def test_the_compiled_trainer_trains_and_evaluates(tmp_path):
    with opened(tmp_path, compile=True, synthetic_images=32, print_freq=1, ema=0.9) as trainer:
        trainer.train_epoch()
        trainer.evaluate_epoch()
        assert len(trainer.log.losses) == 2
        assert trainer.results["eval"].images == trainer.results["eval_ema"].images == 3
    torch._dynamo.reset()


@pytest.mark.parametrize("amp", ["bf16", "fp16", "off"])
def test_replayed_steps_have_the_losses_of_ordinary_ones(tmp_path, monkeypatch, amp):
    """With all that may be in a step; cuDNN's own choices differ from run to run."""
    monkeypatch.setattr(step_graph, "WARM_UP", 3)
    losses = {}
    for graphs in (False, True):
        with opened(tmp_path, cuda_graphs=graphs, amp=amp, print_freq=1, synthetic_images=16 * 12, **EVERYTHING) as run:
            run.train_epoch()
            assert (run.train_step._graph is not None and run.train_step._graph._recorder is not None) == graphs
            run.evaluate_epoch()
            losses[graphs] = run.log.losses
    assert len(losses[True]) == 12
    assert losses[True][:5] == pytest.approx(losses[False][:5], rel=1e-3 if amp == "off" else 0.05)
    assert losses[True] == pytest.approx(losses[False], rel=0.2)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_dry_run_tells_what_the_gpu_allocates(tmp_path, graphs):
    said = []
    with opened(tmp_path, cuda_graphs=graphs, **EVERYTHING) as trainer:
        trainer.log.say = said.append
        dry_run(trainer)
    (memory,) = [line for line in said if line.startswith("memory: ")]
    allocated, total = float(memory.split()[1]), torch.cuda.get_device_properties(0).total_memory / 2**30
    assert 0 < allocated < total and f"of the GPU's {total:.2f} GiB" in memory
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "muon"])
def test_steps_of_other_optimizers_can_be_recorded(tmp_path, monkeypatch, name):
    """So they do not wait for the device either: a recording does not allow that."""
    if name != "adamw":
        pytest.importorskip("timm")
    monkeypatch.setattr(step_graph, "WARM_UP", 3)
    losses = {}
    for graphs in (False, True):
        with opened(tmp_path, cuda_graphs=graphs, amp="bf16", print_freq=1, optimizer=name, lr=1e-3) as run:
            run.train_epoch()
            assert (run.train_step._graph is not None and run.train_step._graph._recorder is not None) == graphs
            losses[graphs] = run.log.losses
    assert losses[True] == pytest.approx(losses[False], rel=0.2)
