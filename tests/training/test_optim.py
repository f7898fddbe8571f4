"""Learning-rate schedules and the optimizer's groups."""

import copy
import os
import subprocess
import sys
from typing import get_args, get_type_hints

import pytest
import torch

import dcd
from training.optim import OPTIMIZERS, build_optimizer, learning_rate
from training.options import OptimConfig
from training.precision import autocast_dtype


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            OptimConfig(epochs=120, lr=0.1, lr_decay="schedule", schedule=(30, 60, 90)),
            {0: 0.1, 29.99: 0.1, 30: 0.01, 60: 1e-3, 119.9: 1e-4},
        ),
        (OptimConfig(epochs=90, lr=0.1, lr_decay="step", step=30), {0: 0.1, 29.99: 0.1, 30: 0.01, 89.9: 1e-3}),
        (OptimConfig(epochs=300, lr=0.1, lr_decay="cos"), {0: 0.1, 150: 0.05, 75: 0.0853553, 300: 0}),
        (OptimConfig(epochs=100, lr=0.1, lr_decay="linear"), {0: 0.1, 50: 0.05, 100: 0}),
        (OptimConfig(epochs=100, lr=0.1, lr_decay="schedule", schedule=(50,), gamma=0.5), {49.9: 0.1, 50: 0.05}),
        # the warmup of the official trainer: from 0 over 5 epochs, and the decay over what is left
        (OptimConfig(epochs=105, lr=0.1, lr_decay="linear", warmup=True), {0: 0, 2.5: 0.05, 5: 0.1, 55: 0.05, 105: 0}),
        (OptimConfig(epochs=102, lr=0.1, lr_decay="cos", warmup=True, warmup_epochs=2), {1: 0.05, 2: 0.1, 52: 0.05}),
    ],
)
def test_learning_rate(config, expected):
    found = {position: learning_rate(config, position) for position in expected}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_weight_decay_is_on_all_parameters_or_spares_norms_and_biases():
    model = dcd.create_model("mobilenetv2_dcd", 10, width_mult=0.1)
    everything = build_optimizer(model, OptimConfig(wd=0.1))
    assert [group["weight_decay"] for group in everything.param_groups] == [0.1]
    assert len(everything.param_groups[0]["params"]) == len(list(model.parameters()))

    decayed, spared = build_optimizer(model, OptimConfig(wd=0.1, norm_decay=False)).param_groups
    names = {p: name for name, p in model.named_parameters()}
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all("bn" in names[p] or names[p].endswith("bias") for p in spared["params"])
    assert not any("bn" in names[p] or names[p].endswith("bias") for p in decayed["params"])


def test_every_optimizer_can_be_chosen():
    assert set(OPTIMIZERS) == set(get_args(get_type_hints(OptimConfig)["optimizer"]))


# Those of NVIDIA's apex need a GPU; tests/training/test_optimizers.py has what stands for them.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("apex-")])
def test_every_optimizer_learns_and_goes_on_from_its_state_bit_for_bit(name):
    torch.manual_seed(0)
    first, x = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1)), torch.randn(64, 8)
    config = OptimConfig(optimizer=name, lr=4.0 if name == "lars" else 0.02)  # LARS's is times 0.001
    optimizer = build_optimizer(first, config)

    def steps(model, optimizer) -> list[float]:
        losses = []
        for _ in range(20):
            loss = (model(x).squeeze(1) - x.prod(1).tanh()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    losses = steps(first, optimizer)
    assert losses[-1] < 0.8 * losses[0]
    other = copy.deepcopy(first)
    resumed = build_optimizer(other, config)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert steps(other, resumed) == steps(first, optimizer)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(other.parameters(), first.parameters(), strict=True))


def test_precision():
    cpu = torch.device("cpu")
    assert autocast_dtype("bf16", cpu) is torch.bfloat16
    assert autocast_dtype("fp16", cpu) is torch.float16
    assert autocast_dtype("off", cpu) is None


@pytest.mark.parametrize("highest", [None, "AVX2"])
def test_automatic_precision_is_what_the_cores_may_use(highest):
    """bf16 where they compute in it, and oneDNN has not been told to leave it alone."""
    environment = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    if highest:
        environment["ONEDNN_MAX_CPU_ISA"] = highest
    program = (
        "import torch; from training.precision import autocast_dtype; "
        "print(autocast_dtype('auto', torch.device('cpu')))"
    )
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    has_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
    assert found.stdout.strip() == ("torch.bfloat16" if has_bf16 and not highest else "None")


def test_skipped_first_steps_leave_no_trace():
    """In fp16 the first steps overflow and are skipped; the momentum must still begin at zero."""
    torch.manual_seed(0)
    model = torch.nn.Linear(1000, 100)
    optimizer = build_optimizer(model, OptimConfig(lr=1.0, wd=0.0))
    scaler = torch.amp.GradScaler("cpu")
    start = model.weight.detach().clone()
    for gradient in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale(model.weight.sum() * gradient + model.bias.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(start - model.weight, torch.ones_like(start))
