"""The main job as its users run it: real processes, real images.

By torchrun where a test says so; elsewhere by ranks that have its variables (`helpers.run`).
"""

import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
import torch

import dcd
from pipelines.build import build_loader
from pipelines.config import DataConfig
from tests.helpers import ROOT, SMALL, difference, error_lines, last, lines, part_of, read, run
from tests.pipelines.helpers import converted
from tests.processes import Job, until


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> Path:
    """The output of a short run of one process."""
    out = tmp_path_factory.mktemp("trained")
    run(*SMALL, "-d", tiny, "-c", out, "-b", 12, "--epochs", 2, "--ema", 0.9)
    return out


OFFICIAL_TRAINING = {
    "resnet50_dcd": (
        "-a resnet50_dcd -b 256 --epochs 120 --lr-decay schedule --lr 0.1 --wd 1e-4 -j 48 --input-size 224 "
        "--label-smoothing 0.1 --dropout 0.1 --mixup 0.2"
    ),
    "mobilenetv2_dcd": (
        "-a mobilenetv2_dcd --epochs 300 --lr-decay cos --lr 0.1 --wd 2e-5 --width-mult 1.0 -j 48 --input-size 224 "
        "--label-smoothing 0.1 --dropout 0.2 -b 512 --mixup 0.2 --fc-squeeze 16"
    ),
}
OFFICIAL_EVALUATION = {
    "resnet50_dcd": "-a resnet50_dcd -b 256 -j 48 --input-size 224 --dropout 0.1 --evaluate",
    "mobilenetv2_dcd": (
        "-a mobilenetv2_dcd -b 512 --width-mult 1.0 -j 48 --input-size 224 --dropout 0.1 --fc-squeeze 16 --evaluate"
    ),
}


@pytest.fixture(scope="module")
def few(digits, tmp_path_factory) -> Path:
    """Enough of the digits for one batch of the official commands: 520 images to train and 60 to evaluate."""
    return part_of(digits, tmp_path_factory.mktemp("few"), {"train": [52] * 10, "val": [6] * 10})


@pytest.mark.parametrize("name", OFFICIAL_TRAINING)
def test_official_commands(few, tmp_path, name):
    """Train by the official command, shortened to one epoch of smaller images, then evaluate by the official one."""
    smaller = ["--epochs", 1, "--input-size", 32]
    run(*OFFICIAL_TRAINING[name].split(), "-d", few, "-c", tmp_path, *smaller, ranks=2, torchrun="resnet" in name)
    summary = read(tmp_path, "summary.json")
    assert summary["arch"] == name and summary["eval"]["images"] == 60
    assert summary["train_images_per_sec"] > 0

    weight = tmp_path / "checkpoints" / "last.pth"
    output = run(
        *OFFICIAL_EVALUATION[name].split(),
        "-d",
        few,
        "-c",
        tmp_path / "e",
        "--weight",
        weight,
        *smaller[2:],
        ranks=2,
    )
    result = read(tmp_path / "e", "evaluation.json")["result"]
    assert result["top1"] == summary["eval"]["top1"] and result["images"] == 60
    assert f"top1 {result['top1']:.3f}" in output


def test_outputs(trained):
    resolved = read(trained, "config.json")
    assert resolved["config"]["arch"] == "mobilenetv2_dcd" and resolved["config"]["num_classes"] == 3
    assert resolved["config"]["momentum"] == 0.9 and resolved["versions"]["torch"] == torch.__version__
    assert {"device", "git_commit", "world_size"} <= resolved.keys()
    assert [line["global_step"] for line in lines(trained, "train")] == [2, 4, 6, 8]
    assert all(0 <= line["data_wait"] <= 1 and line["images_per_sec"] > 0 for line in lines(trained, "train"))
    assert [line["epoch"] for line in lines(trained, "eval")] == [0, 1]
    assert [line["epoch"] for line in lines(trained, "eval_ema")] == [0, 1]
    assert {"last.pth"} <= {path.name for path in (trained / "checkpoints").iterdir()}
    assert list((trained / "tensorboard").glob("events.*"))
    state = last(trained)
    assert (state["epoch"], state["step"], state["random_state"]) == (2, 0, {"seed": 0, "repeats": 1})
    assert {"model", "optimizer", "scaler", "ema", "config", "best_top1"} <= state.keys()
    assert read(trained, "summary.json")["eval"]["images"] == 23


CHANGED = ["--repeats", 2, "--rand-augment", 2, 9, "--random-erasing", 0.5, "--cutmix", 1]


@pytest.mark.parametrize(
    ("ranks", "precision", "stops", "augmentation"), [(2, "off", (5,), CHANGED), (None, "fp16", (3, 3), [])]
)
def test_resume_is_exact_to_the_bit(tiny, tmp_path, ranks, precision, stops, augmentation):
    """Stopped in the middle of an epoch, even twice, and gone on from: the weights of the run that was not stopped."""
    everything = ["--dropout", 0.2, "--mixup", 0.4, "--mixup-epochs", 1, "--ema", 0.9, "--clip-grad", 1.0]
    common = [*SMALL, "-d", tiny, "-b", 12, "--epochs", 2, "--amp", precision, *everything, *augmentation]
    run(*common, "-c", tmp_path / "whole", ranks=ranks)
    for steps in stops:
        output = run(*common, "-c", tmp_path / "parts", "--stop-after-steps", steps, ranks=ranks)
        assert "stopped; the same command goes on" in output
    assert (last(tmp_path / "parts")["epoch"], last(tmp_path / "parts")["step"]) == divmod(sum(stops), 4)
    assert "going on from" in run(*common, "-c", tmp_path / "parts", "-j", 1, ranks=ranks)

    whole, parts = last(tmp_path / "whole"), last(tmp_path / "parts")
    whole.pop("config"), parts.pop("config")
    assert difference(parts, whole) == []
    steps = [line["global_step"] for line in lines(tmp_path / "parts", "train")]
    assert steps == sorted(set(steps)) and steps[-1] == 8


def test_a_signal_ends_a_run_with_a_checkpoint(tiny, start, tmp_path):
    """SIGTERM to torchrun, as a batch system sends it: nothing is lost, and the exit code says unfinished."""
    out = tmp_path / "out"
    job = start(*SMALL, "-d", tiny, "-b", 12, "--epochs", 200, "--seed", 1, "-c", out, torchrun=True)
    wait_for(job, out, "eval")
    job.signal(signal.SIGTERM)
    assert job.wait(120) != [0] and "stopped; the same command goes on" in job.output
    assert "ends with threads" not in job.output and read(out, "status.json")["state"] == "preempted"
    done = last(out)["epoch"] * 4 + last(out)["step"]
    assert 4 <= done < 800
    assert lines(out, "train")[-1]["global_step"] == done, "the checkpoint is of the last step that was logged"


def wait_for(job: Job, out: Path, kind: str) -> None:
    """Until a line of this kind is in the log."""
    log = out / "metrics.jsonl"
    until(lambda: not job.running or (log.exists() and f'"{kind}"' in log.read_text()))
    assert job.running, job.output


def test_a_run_that_waits_for_data_is_preempted_in_seconds(tiny, start, tmp_path):
    """Its loading process is halted; and meanwhile no other run may use its folder."""
    out = tmp_path / "out"
    common = [*SMALL, "-d", tiny, "-b", 12, "--epochs", 2000, "-c", out, "-j", 1]
    job = start(*common, ranks=1)
    wait_for(job, out, "eval")
    for worker in psutil.Process(job.pids[0]).children():
        worker.suspend()
    output = run(*common, fails=True)
    assert f"{out} is in use by another run (process {job.pids[0]} on " in error_lines(output)[0]
    job.signal(signal.SIGUSR1)
    before = time.monotonic()
    assert job.wait(60) == [75] and time.monotonic() - before < 10, job.output
    assert "stopped; the same command goes on" in job.output and read(out, "status.json")["state"] == "preempted"
    assert last(out)["epoch"] * 4 + last(out)["step"] == lines(out, "train")[-1]["global_step"] > 0


def test_a_rank_that_hangs_ends_the_run_with_its_name(tiny, start, tmp_path):
    out = tmp_path / "out"
    job = start(*SMALL, "-d", tiny, "-b", 12, "--epochs", 2000, "-c", out, "--timeout", 8)
    wait_for(job, out, "eval")
    job.signal(signal.SIGSTOP, 1)
    until(lambda: job.running and job.codes[0] is not None, 30)
    job.signal(signal.SIGKILL, 1)
    assert job.wait(60) == [1, -signal.SIGKILL]
    (line,) = error_lines(job.output)
    assert re.search("no progress for [0-9]+ s .*; rank 1 is silent .step [0-9]+, ", line), line
    assert re.search(r'train_dist.py", line \d+ in train\n', job.output), job.output
    assert re.search(r'data/_utils/worker.py", line \d+ in _worker_loop\n', job.output), job.output


def test_torchrun_restarts_a_run_in_which_a_rank_dies(tiny, start, tmp_path):
    """All go on from the last checkpoint, though torchrun's store still holds the addresses of the dead."""
    out = tmp_path / "out"
    args = [*SMALL, "-d", tiny, "-b", 12, "--epochs", 5, "--lr", 1e-4, "--checkpoint-steps", 2, "-c", out]
    job = start(*args, torchrun=True, launcher=["--max-restarts=3"])
    wait_for(job, out, "eval")
    job.ranks()[1].kill()
    assert job.wait(120) == [0] and job.output.count("going on from") == 1, job.output
    assert [line["global_step"] for line in lines(out, "train")] == list(range(2, 21, 2))


def test_two_ranks_train_as_one(tiny, tmp_path):
    """The same global batches, with mixup: two ranks are one that accumulates over the two halves."""
    common = [*SMALL, "-d", tiny, "-b", 12, "--epochs", 1, "--mixup", 0.4, "--no-warmup", "--lr", 0.01]
    run(*common, "-c", tmp_path / "one", "--accumulate", 2)
    run(*common, "-c", tmp_path / "two", ranks=2)
    one, two = (last(tmp_path / name)["model"] for name in ("one", "two"))
    parameters = [name for name in one if "running" not in name and "tracked" not in name]
    for name in parameters:
        torch.testing.assert_close(
            two[name], one[name], rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_evaluation_is_exact_on_any_number_of_ranks(tiny, trained, tmp_path):
    """23 images in batches of 6, and of 21, which leave some ranks without images in the last step."""
    weight = trained / "checkpoints" / "last.pth"
    results = []
    for ranks, batch in ((None, 6), (3, 21)):
        out = tmp_path / f"{ranks}-{batch}"
        run(*SMALL, "-d", tiny, "-c", out, "-b", batch, "--weight", weight, "--evaluate", ranks=ranks)
        results.append(read(out, "evaluation.json")["result"])
    assert {result["images"] for result in results} == {23}
    assert len({(result["top1"], result["top5"]) for result in results}) == 1
    assert [result["loss"] for result in results] == pytest.approx([results[0]["loss"]] * len(results), rel=1e-5)
    assert results[0]["top1"] == lines(trained, "eval")[-1]["top1"]


def test_the_moving_average_is_evaluated(tiny, trained, tmp_path):
    weight = trained / "checkpoints" / "last.pth"
    run(*SMALL, "-d", tiny, "-c", tmp_path, "-b", 12, "--weight", weight, "--ema", 0.9, "--evaluate")
    result, logged = read(tmp_path, "evaluation.json")["result"], lines(trained, "eval_ema")[-1]
    assert (result["top1"], result["loss"]) == (logged["top1"], logged["loss"])


def test_official_checkpoint_is_evaluated(tmp_path, digits):
    weight = ROOT / "tests" / "golden" / "mobilenetv2_dcd_w0.1_c10.pth.tar"
    run(*SMALL, "-d", digits, "-c", tmp_path, "-b", 60, "--dropout", 0.1, "--weight", weight, "-e")
    assert read(tmp_path, "evaluation.json")["result"]["images"] == 360


def test_synthetic_data_and_progressive_sizes(tmp_path):
    """No data at all, and images that grow."""
    args = ["--backend", "synthetic", "--synthetic-images", 64, "--num-classes", 5, "-b", 16, "--epochs", 2]
    run(*SMALL, *args, "-c", tmp_path, "--start-size", 32, "--size-ramp", 0, 1, "--input-size", 64, ranks=2)
    assert read(tmp_path, "summary.json")["eval"]["images"] == 6


def top1_by(backend: str, data: Path, model: torch.nn.Module) -> float:
    """Percent of the digits' evaluation images that the model gets right, read by `backend`."""
    loader = build_loader(DataConfig(data, backend, batch_size=90, workers=2, eval_size=32), "val")
    with torch.no_grad():
        right = [(model(batch.images).argmax(1) == batch.labels).float() for batch in loader]
    loader.close()
    return 100 * torch.cat(right).mean().item()


def test_every_backend_goes_on_with_the_run_of_another(digits, tmp_path):
    """One run, by all of them in turn, from a folder and from .beton files; its model is as good by each of them."""
    beton, out = converted(digits, tmp_path / "beton"), tmp_path / "out"
    # The static network: after so short a training the dynamic one is chaotic in evaluation.
    flags = "-a resnet18 -b 64 --epochs 2 --lr 0.03 --lr-decay cos --input-size 32 --flip 0 --crop-area 0.6 1 --amp off"
    common = [*flags.split(), "-c", out, "-j", 2, "-p", 2]
    run(*common, "-d", beton, "--backend", "dali", "--stop-after-steps", 6)
    run(*common, "-d", beton, "--backend", "ffcv", "--stop-after-steps", 10, ranks=2)
    run(*common, "-d", digits, "--backend", "torchvision", "--stop-after-steps", 8)
    run(*common, "-d", beton)
    summary = read(out, "summary.json")
    assert summary["epochs"] == 2 and summary["eval"]["top1"] > 60  # of ten classes

    model = dcd.create_model("resnet18", num_classes=10).eval()
    dcd.load_checkpoint(model, out / "checkpoints" / "last.pth")
    found = [top1_by(backend, beton, model) for backend in ("ffcv", "dali", "torchvision")]
    found += [top1_by(backend, digits, model) for backend in ("dali", "torchvision")]
    assert max(found) - min(found) <= 0.1 and abs(found[0] - summary["eval"]["top1"]) <= 0.1


# --- what goes wrong ---


def break_class(data: Path) -> None:
    for image in next((data / "train").iterdir()).iterdir():
        image.unlink()


def break_class_names(data: Path) -> None:
    (data / "val" / "0_zero").rename(data / "val" / "renamed")


@pytest.mark.parametrize(
    ("ranks", "args", "spoil", "message"),
    [
        (2, ["--wrong", "1"], None, "Unrecognized options: --wrong"),
        (2, ["-d", "/nowhere"], None, "no folder /nowhere/val: it must hold CLASS/"),
        (None, ["--num-classes", "2"], None, "--num-classes 2: the data has 3 classes"),
        (2, ["--sync-bn"], None, "--sync-bn works on GPUs only"),
        (2, [], break_class, "has no images in"),
    ],
)
def test_errors_are_one_line_on_every_rank(tiny, tmp_path, ranks, args, spoil, message):
    data = tiny
    if spoil:
        data = shutil.copytree(tiny, tmp_path / "data")
        spoil(data)
    output = run(*SMALL, "-d", data, "-c", tmp_path / "out", "-b", 12, "--epochs", 1, *args, ranks=ranks, fails=True)
    found = error_lines(output)
    assert len(found) == (ranks or 1) and all(message in line for line in found), output
    assert "Traceback" not in output


def test_an_error_by_torchrun_is_one_line_too(tiny, tmp_path):
    output = run(*SMALL, "-d", tiny, "-c", tmp_path / "out", "-b", 13, ranks=2, torchrun=True, fails=True)
    found = error_lines(output)
    # it may end the second rank before that has spoken; what is said is the same line
    assert found and all("--batch-size 13 is global: 2 ranks" in line for line in found), output
    assert "]: Traceback" not in output and output.count("Traceback") == 1, "torchrun's own"


@pytest.mark.parametrize(
    ("args", "spoil", "message"),
    [
        (["-a", "mobilenetv2_dc"], None, "unknown model 'mobilenetv2_dc'; did you mean mobilenetv2_dcd"),
        (["-b", "4096"], None, "48 training images do not fill one batch of 4096"),
        (["--weight", "/nowhere.pth"], None, "no checkpoint at /nowhere.pth"),
        (["--crop-area", "0.5", "0.2"], None, "the crop's area must lie in"),
        ([], break_class_names, "hold different classes: 0_zero, renamed"),
    ],
)
def test_more_errors_are_one_line(tiny, tmp_path, main, args, spoil, message):
    """In this process: above are those whose end is seen from outside."""
    data = tiny
    if spoil:
        data = shutil.copytree(tiny, tmp_path / "data")
        spoil(data)
    output = main(*SMALL, "-d", data, "-c", tmp_path / "out", "-b", 12, "--epochs", 1, *args)
    (line,) = error_lines(output)
    assert message in line and output.endswith(line), output


def test_a_checkpoint_of_another_model_is_left_alone(tiny, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    before = (tmp_path / "out" / "checkpoints" / "last.pth").read_bytes()
    output = run(
        "-a", "resnet18", "--input-size", 32, "-d", tiny, "-c", tmp_path / "out", "-b", 12, ranks=2, fails=True
    )
    assert (
        "holds mobilenetv2_dcd (num_classes 3, width_mult 0.1, fc_squeeze 16), this run is resnet18"
        in error_lines(output)[0]
    )
    assert (tmp_path / "out" / "checkpoints" / "last.pth").read_bytes() == before


@pytest.mark.parametrize("ranks", [None, 2])
def test_a_damaged_image_loses_nothing(tiny, tmp_path, ranks):
    """The run says which image, keeps what it has trained, and goes on when the image is mended."""
    data = shutil.copytree(tiny, tmp_path / "data")
    common = [*SMALL, "-d", data, "-b", 12, "--epochs", 2, "-c", tmp_path / "out"]
    run(*common, "--stop-after-steps", 1, ranks=ranks)
    victim = sorted((data / "train").rglob("*.JPEG"))[17]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    output = run(*common, ranks=ranks, fails=True)
    assert any(str(victim) in line and "does not decode" in line for line in error_lines(output)), output
    assert last(tmp_path / "out")["step"] >= 1

    victim.write_bytes(content)
    assert "going on from" in run(*common, ranks=ranks)
    assert read(tmp_path / "out", "summary.json")["epochs"] == 2


def test_a_finished_run_is_left_alone(tiny, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    output = run(*SMALL, "-d", tiny, "-c", tmp_path / "out", "-b", 12, "--epochs", 2, "--ema", 0.9)
    assert "has done all 2 epochs" in output
    for name in ("summary.json", "metrics.jsonl", "checkpoints/last.pth"):
        assert (tmp_path / "out" / name).read_bytes() == (trained / name).read_bytes()


def test_a_diverged_run_keeps_the_good_checkpoint(tiny, tmp_path):
    common = [*SMALL, "-d", tiny, "-b", 12, "-c", tmp_path]
    run(*common, "--epochs", 1)
    before = last(tmp_path)
    output = run(*common, "--epochs", 20, "--lr", 1e18, fails=True)
    assert "the loss is" in error_lines(output)[0] and "lower --lr" in error_lines(output)[0]
    assert all(tensor.isfinite().all() for tensor in last(tmp_path)["model"].values())
    assert last(tmp_path)["epoch"] >= before["epoch"]
