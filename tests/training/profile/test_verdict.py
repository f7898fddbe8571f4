"""The verdict on clear cases: what it names, and what it advises."""

from dataclasses import replace

import pytest

from training.profile.step_timer import PHASES, StepTimes
from training.profile.verdict import Rates, Setting, find_bound

GPU = Setting(
    device="cuda",
    workers=16,
    cores=16,
    world_size=1,
    backend="auto",
    converted=True,
    exact_decode=False,
    mixed=True,
    compiled=False,
)
CPU = replace(GPU, device="cpu", workers=2, cores=2, mixed=False)


def times(host_lead_s: float = 0.5, **shares: float) -> StepTimes:
    """A step of 200 ms; what the shares leave is forward and backward."""
    left = 1 - sum(shares.values())
    shares = {"forward": left / 3, "backward": left * 2 / 3, **shares}
    return StepTimes(20, {phase: 0.2 * shares.get(phase, 0.0) for phase in PHASES}, host_lead_s)


def check(found, bound: str, *words: str, without: tuple[str, ...] = ()) -> None:
    assert found.bound == bound
    assert all(word in found.sentence for word in words), found.sentence
    assert not any(word in found.sentence for word in without), found.sentence
    assert found.sentence.endswith(".") and ". " not in found.sentence and "\n" not in found.sentence


def test_loader_bound_on_few_workers():
    found = find_bound(times(data=0.6), replace(GPU, workers=4), Rates(400, 1200, 390))
    words = ("60 % of a step", "--workers 16 (now 4)", "400 images/s", "the model takes 1,200")
    check(found, "loader", *words, without=("dali",))


def test_loader_bound_on_all_cores():
    found = find_bound(times(data=0.4), replace(GPU, backend="ffcv"), Rates(700, 1200, 690))
    check(found, "loader", "--backend dali", "--input-size", "more cores", without=("--workers", "make_dataset"))
    assert "--backend" not in find_bound(times(data=0.4), replace(GPU, backend="dali")).sentence
    slow = replace(CPU, converted=False, exact_decode=True)
    check(find_bound(times(data=0.4), slow), "loader", "tools.make_dataset", "no --exact-decode", without=("dali",))


def test_copy_bound():
    check(find_bound(times(data=0.02, copy=0.3), GPU), "copy", "30 % of a step", "--backend dali")


def test_model_bound():
    found = find_bound(times(data=0.01), GPU, Rates(9000, 1200, 1190))
    check(found, "model", "99 % of a step", "--compile", "more GPUs", without=("--amp",))
    tuned = find_bound(times(), replace(GPU, mixed=False, compiled=True))
    check(tuned, "model", "--amp bf16 or fp16", without=("--compile",))
    check(find_bound(times(host_lead_s=0.0), CPU), "model", "a GPU", without=("--compile", "--amp"))


def test_bound_by_what_is_in_each_others_way():
    found = find_bound(times(data=0.3), CPU, Rates(400, 300, 170))
    check(found, "contention", "170 images/s", "400 and 300", "more cores")
    found = find_bound(times(data=0.05), GPU, Rates(2000, 1200, 700))
    check(found, "contention", "--backend ffcv", "fewer --workers (now 16 on 16 cores)", "--compile")
    found = find_bound(times(data=0.11), replace(CPU, workers=0), Rates(180, 20, 18))
    check(found, "contention", "--workers 2, which load while the model computes", without=("a GPU",))
    assert find_bound(times(), CPU, Rates(400, 300, 280)).bound == "model"


def test_reduction_bound():
    setting = replace(GPU, world_size=8)
    found = find_bound(times(reduce=0.4), setting, Rates(9000, 1200, 1190))
    check(found, "reduction", "8 ranks", "40 % of a step", "larger --batch-size", "--accumulate")
    assert find_bound(times(reduce=0.3, data=0.4), setting).bound == "loader", "others wait for the late rank"


def test_bound_by_the_rest():
    check(find_bound(times(other=0.3), GPU), "loop", "30 %", "--print-freq")
    check(find_bound(times(optimizer=0.4), GPU), "optimizer", "40 %", "larger --batch-size")
    check(find_bound(times(host_lead_s=0.004), GPU), "launching", "200.0 ms", "4.0 ms", "--cuda-graphs")
    replayed = find_bound(times(host_lead_s=0.004), replace(GPU, graphs=True))
    check(replayed, "launching", "help: the CUDA graph from which the steps behind these are replayed, --compile")


@pytest.mark.parametrize("setting", [GPU, CPU])
@pytest.mark.parametrize("phase", PHASES)
def test_there_is_always_one_sentence(setting, phase):
    for share in (0.05, 0.15, 0.35, 0.9):
        found = find_bound(times(**{phase: share}), setting)
        check(found, found.bound, "what would help: ")
