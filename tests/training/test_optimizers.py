"""Every optimizer of --optimizer: what leaves out a step, what goes on, what is said of packages that are not there.

NVIDIA's apex needs a GPU and a compiler: what stands for it here has its interfaces and its counts on the host.
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.amp import GradScaler

import dcd
from tests.helpers import build_trainer, difference, whole_and_gone_on
from tests.training.test_trainer import Synchronisations
from training import nvidia_apex, optimizers
from training.optim import build_optimizer
from training.optimizers import OPTIMIZERS
from training.options import ConfigError, OptimConfig
from training.safe_step import SafeStep

LR = {"lars": 4.0}  # times a trust coefficient of 0.001; the others: 0.01
APEX = [name for name in OPTIMIZERS if name.startswith("apex-")]
COUNTS_ON_DEVICE = [name for name in OPTIMIZERS if name != "apex-lamb"]


class FusedSGD(torch.optim.Optimizer):
    def __init__(self, groups, lr, momentum, nesterov, weight_decay):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay})

    def zero_grad(self):
        raise NotImplementedError

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            assert isinstance(group["lr"], float), "its kernels take a number"
            for p in group["params"]:
                moment = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                moment.mul_(group["momentum"]).add_(p.grad + group["weight_decay"] * p)
                p.sub_(moment, alpha=group["lr"])


class FusedLAMB(torch.optim.Optimizer):
    def __init__(self, groups, lr, betas, eps, weight_decay, max_grad_norm):
        assert max_grad_norm == float("inf")
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def zero_grad(self):
        raise NotImplementedError

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            assert isinstance(group["lr"], float), "its kernels take a number"
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                moment = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                moment.lerp_(p.grad, 1 - group["betas"][0])
                p.sub_(moment.sign(), alpha=group["lr"] / (1 - group["betas"][0] ** group["step"]) ** 0.5)


@pytest.fixture(autouse=True)
def stand_ins_for_apex(monkeypatch):
    kinds = {"FusedSGD": FusedSGD, "FusedLAMB": FusedLAMB}
    monkeypatch.setattr(optimizers, "fused_optimizer", lambda kind, flag, device: kinds[kind])


class Steps:
    """Steps of a small model with a convolution, by given gradients; `bad` ones are not finite."""

    def __init__(self, name: str, amp: bool):
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(4, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten(), torch.nn.Linear(32, 8)
        self.model = torch.nn.Sequential(*layers).to(memory_format=torch.channels_last)
        config = OptimConfig(optimizer=name, lr=LR.get(name, 0.01), norm_decay=False)
        rate = None if name in optimizers.WITH_LR_ON_HOST else torch.tensor(config.lr)
        self.optimizer = build_optimizer(self.model, config, rate)
        self.scaler = GradScaler("cpu", enabled=amp, init_scale=2.0**10)
        self._safe = SafeStep(self.model, self.optimizer, self.scaler, None, None)

    def do(self, *seeds: int | None) -> list[float]:
        """A step by each seed, or a bad one by None; whether each was left out."""
        left_out = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed or 0)
            for number, parameter in enumerate(self.model.parameters()):
                gradient = torch.randn(parameter.shape, generator=generator).contiguous(
                    memory_format=torch.channels_last if parameter.dim() == 4 else torch.contiguous_format
                )
                if seed is None and number % 2:
                    gradient.view(-1)[0] = torch.inf if number % 4 == 1 else torch.nan
                parameter.grad = self.scaler.scale(gradient)
            self._safe.begin()
            left_out.append(float(self._safe.update()))
            self._safe.end()
        return left_out

    def numbers(self) -> dict:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()["state"]})


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_bad_step_changes_no_weight_and_no_state(name, amp):
    steps = Steps(name, amp)
    assert steps.do(1, 2) == [0, 0]
    before = steps.numbers()
    assert steps.do(None) == [1]
    assert difference(steps.numbers(), before) == []
    assert steps.do(3) == [0]
    assert len(difference(steps.numbers(), before)) >= len(list(steps.model.parameters()))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", COUNTS_ON_DEVICE)
def test_after_bad_steps_it_goes_on_as_if_they_had_not_been(name, amp):
    """Also where they are the first ones, as in fp16, where the scale is looked for."""
    good, with_bad = Steps(name, amp), Steps(name, amp)
    good.do(1, 2, 3)
    assert with_bad.do(None, None, 1, 2, None, 3) == [1, 1, 0, 0, 1, 0]
    assert difference(with_bad.numbers(), good.numbers()) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_run_goes_on_bit_for_bit_from_its_checkpoint(tmp_path, name):
    options = {"images": 16 * 4, "optimizer": name, "lr": LR.get(name, 0.01), "lr_decay": "cos", "norm_decay": False}
    options |= {"ema": 0.9, "clip_grad": 1.0, "accumulate": 2}
    before = build_trainer(tmp_path, **options).model.state_dict()
    whole, second = whole_and_gone_on(tmp_path, **options)
    assert difference(second.train_step.state_dict(), whole.train_step.state_dict()) == []
    assert whole.skipped_steps == 0
    assert len(difference(whole.model.state_dict(), before)) > 0.9 * len(before)  # a tiny step can be lost in rounding


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars"])  # on a CPU, the count of Muon's AdamW is read by the host
def test_no_step_waits_for_the_device(tmp_path, name):
    trainer = build_trainer(tmp_path, optimizer=name, clip_grad=1.0)
    trainer.train_step.begin_epoch()
    batch = next(iter(trainer.loader))
    with Synchronisations() as found:
        for _ in range(2):
            trainer.train_step(batch, trainer.progress)
    assert found.count == 0


def test_lamb_is_that_of_timm():
    import timm.optim

    mine = Steps("lamb", False)
    theirs = copy.deepcopy(mine.model)
    decayed, spared = (group["params"] for group in mine.optimizer.param_groups)
    where = {id(p): q for p, q in zip(mine.model.parameters(), theirs.parameters(), strict=True)}
    groups = [
        {"params": [where[id(p)] for p in decayed]},
        {"params": [where[id(p)] for p in spared], "weight_decay": 0},
    ]
    optimizer = timm.optim.Lamb(groups, lr=0.01, weight_decay=1e-4, max_grad_norm=None)
    for seed in range(1, 6):
        mine.do(seed)
        for p, q in zip(mine.model.parameters(), theirs.parameters(), strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
    for p, q in zip(mine.model.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_muon_takes_the_hidden_weights():
    model = dcd.create_model("mobilenetv2_dcd", 10, width_mult=0.25)
    optimizer = build_optimizer(model, OptimConfig(optimizer="muon", lr=0.01))
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    by_muon = {name for name, p in model.named_parameters() if "momentum_buffer" in optimizer.state[p]}
    by_adamw = {name for name, p in model.named_parameters() if "exp_avg" in optimizer.state[p]}
    assert by_muon | by_adamw == {name for name, _ in model.named_parameters()} and not by_muon & by_adamw
    assert {"stem.weight", "blocks.1.expand.static_conv.weight", "blocks.1.expand.proj_in.weight"} <= by_muon
    assert all(name in by_adamw for name, p in model.named_parameters() if p.dim() == 1 or "classifier" in name)


@pytest.mark.parametrize("name", ["lamb", "lars", "muon"])
def test_without_timm_one_line_says_what_to_install(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ConfigError, match=f"--optimizer {name} is timm's: pip install 'timm>="):
        build_optimizer(torch.nn.Linear(2, 2), OptimConfig(optimizer=name))


@pytest.mark.parametrize("options", [{"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": -1e-8}])
def test_values_that_no_optimizer_takes(options):
    with pytest.raises(ConfigError, match="--(betas|eps) .*: must"):
        OptimConfig(optimizer="adamw", **options)


@pytest.mark.parametrize("name", APEX)
def test_cuda_graphs_are_not_had_with_apex(tmp_path, capsys, name):
    build_trainer(tmp_path, optimizer=name, cuda_graphs=True)
    said = capsys.readouterr().out
    assert said == f"--cuda-graphs: a step of --optimizer {name} cannot be recorded, and is not replayed\n"


def apex_found(packages: Path) -> str:
    """What is said of the packages in a folder, or the class that is found."""
    program = f"""
import sys
sys.path.insert(0, {str(packages)!r})
import torch
from training.nvidia_apex import fused_optimizer
from training.options import ConfigError
for device in ("cuda", "cpu"):
    try:
        print(fused_optimizer("FusedSGD", "apex-sgd", torch.device(device)))
    except ConfigError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_said_of_each_apex(tmp_path):
    assert apex_found(tmp_path).startswith("--optimizer apex-sgd needs NVIDIA's apex, which is not on PyPI: git clone")
    # PyPI's is a toolkit for web sites; what is imported of it would be an error here.
    unrelated = tmp_path / "unrelated" / "apex"
    unrelated.mkdir(parents=True)
    (unrelated / "__init__.py").write_text("raise RuntimeError('imported')")
    assert "the installed package apex is an unrelated toolkit, as PyPI's is: pip uninstall apex, then git clone" in (
        apex_found(unrelated.parent)
    )
    right = tmp_path / "right" / "apex" / "optimizers"
    right.mkdir(parents=True)
    (right.parent / "__init__.py").touch()
    (right / "__init__.py").write_text("class FusedSGD: pass")
    said = apex_found(right.parents[1])
    assert said.startswith("--optimizer apex-sgd: apex is installed without its CUDA extensions (amp_C): git clone")
    (right.parents[1] / "amp_C.py").touch()
    on_gpu, on_cpu = apex_found(right.parents[1]).splitlines()
    assert on_gpu == "<class 'apex.optimizers.FusedSGD'>"
    assert on_cpu == "--optimizer apex-sgd runs on GPUs only: leave out 'apex-', or use another one"
    assert "pip install" in nvidia_apex.INSTALL and "\n" not in nvidia_apex.INSTALL
