"""`tools.report`: the page as a browser shows it, runs of any state, and its figures against plain computations."""

import json
import math
import re
import shutil
import subprocess
from html import escape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dcd
from dcd.layers.choices import set_path
from pipelines.build import build_loader
from pipelines.config import AugmentationConfig, DataConfig
from tests.helpers import SMALL, part_of, read
from tools.report import main as report
from tools.reporting.chart import MOST_POINTS, Axis, Curve, chart, thin
from tools.reporting.findings import find_out
from tools.reporting.runs import colour, read_runs
from training.config import Config

SECTIONS = ["Results", "Curves", "Configuration", "Classes and mistakes", "What is dynamic"]
CHROMIUM = shutil.which("chromium")
SYNTHETIC = "it was trained on synthetic images; --data names others"
NASTY = "<b>&\"'one"  # a class


# --- in a browser ---


def browse(page: Path, screenshot: Path) -> str:
    """The elements of a page after its scripts, and a picture of it, by Chromium with a profile of its own."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --hide-scrollbars --virtual-time-budget=2000 --dump-dom"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={page.parent / 'profile'}", "--window-size=1280,1600"]
    command += [f"--screenshot={screenshot}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which make setup installs as root on Debian")
def test_a_browser_shows_two_runs(main, digits, tmp_path, capsys):
    data = part_of(digits, tmp_path / "data", {"train": [16, 16, 16], "val": [8, 8, 7]})
    for split in ("train", "val"):
        (data / split / "1_one").rename(data / split / NASTY)
    options = [*SMALL, "-d", data, "-b", 12, "--epochs", 2]
    main(*options, "-c", tmp_path / "first", "--ema", 0.5)
    main(*options, "-c", tmp_path / "second", "--lr", 0.01, "--zero-init-fusion")
    page = tmp_path / "report.html"
    report([tmp_path / "first", tmp_path / "second"], out=page, images=10)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{page}: 2 runs, 0.")
    text = page.read_text()
    assert not re.search(r"(https?:)?//\w|url\(|@import", re.sub(r"data:image/jpeg;base64,[\w+/=]*", "", text))

    dom = browse(page, tmp_path / "page.png")
    assert 'data-scripts="done"' in dom and "data-error" not in dom
    assert re.findall(r"<h2>(.*?)</h2>", dom) == SECTIONS
    assert dom.count('<svg class="chart"') == 7 and "Left out" not in dom and "No run" not in dom
    (differing,) = re.findall(r"<th>differing</th>.*?</table>", dom, re.DOTALL)
    cells = [re.findall("<td>(.*?)</td>", row) for row in differing.split("<tr>")]
    rows = {name: values for name, *values in filter(None, cells)}
    assert rows == {"zero_init_fusion": ["false", "true"], "lr": ["0.005", "0.01"], "ema": ["0.5", "null"]}
    summary = read(tmp_path / "second", "summary.json")
    assert f"<td>{summary['best_top1']:.2f} (epoch {summary['best_epoch'] + 1})</td>" in dom
    wrong = [round(23 * (1 - float(top1) / 100)) for top1 in re.findall(r"top-1 ([\d.]+) %,", dom)]
    assert dom.count('<img src="data:image/jpeg;base64,') == sum(wrong) and len(wrong) == 2
    assert escape(NASTY) in text and NASTY not in text

    with Image.open(tmp_path / "page.png") as image:
        pixels = np.asarray(image.convert("RGB")) @ [1 << 16, 1 << 8, 1]
    assert image.format == "PNG" and image.size == (1280, 1600) and len(np.unique(pixels)) > 100
    assert all((pixels == int(colour(run)[1:], 16)).sum() > 200 for run in (0, 1)), "a curve of each run"

    report([tmp_path / "first", tmp_path / "second"], out=page, images=10)
    assert page.read_text() == text, "the same bytes again"


# --- runs of any state ---


def write_run(folder: Path, lines=(), state: str | None = "running", **options) -> Path:
    """A run's folder, by hand; a line may be a dictionary or a text."""
    folder.mkdir()
    config = Config().with_options(**{"arch": "mobilenetv2_dcd", "epochs": 3, "checkpoint": folder, **options})
    (folder / "config.json").write_text(json.dumps({"config": config.to_dict(), "versions": {"torch": "2.11"}}))
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "metrics.jsonl").write_text("\n".join(texts))
    if state is not None:
        (folder / "status.json").write_text(json.dumps({"state": state, "time": "2026-01-01T00:00:00"}))
    return folder


def train_line(epoch: int, step: int, **figures) -> dict:
    """Of a run of 4 steps in an epoch."""
    usual = {"loss": 2.0, "top1": 10.0, "lr": 0.1, "images_per_sec": 90.0, "data_wait": 0.1, "skipped_steps": 0}
    return {"kind": "train", "global_step": 4 * epoch + step, "epoch": epoch, "step": step, **usual, **figures}


def eval_line(epoch: int, top1: float | None, **figures) -> dict:
    return {"kind": "eval", "global_step": 4 * epoch + 4, "epoch": epoch, "loss": 1.0, "top1": top1, **figures}


def test_runs_of_any_state(tmp_path, capsys):
    cut = [train_line(0, 2), train_line(0, 4, loss=None), eval_line(0, 20.0), "", train_line(1, 2), '{"kind": "tra']
    runs = [
        write_run(tmp_path / "cut", cut),
        write_run(tmp_path / "none", state=None),
        write_run(
            tmp_path / "spoilt", [eval_line(0, 90.0, not_finite=1), eval_line(1, 30.0), '{"kind": "train"}', "[]"]
        ),
    ]
    (tmp_path / "spoilt" / "summary.json").write_text("{")
    report(runs, out=tmp_path / "page.html")
    output = capsys.readouterr().out.splitlines()
    assert output[:-1] == [
        "cut: 1 of the lines in metrics.jsonl cannot be read, and are left out",
        "none: it has logged no step yet",
        "spoilt: 2 of the lines in metrics.jsonl cannot be read, and are left out",
        "spoilt: summary.json cannot be read, and is left out",
        *(f"{run.name}: mistakes and spread are left out: {SYNTHETIC}" for run in runs),
    ]
    text = (tmp_path / "page.html").read_text()
    assert "epochs done" in text and text.count("no finite number") == 1
    assert "20.00 (epoch 1)" in text and "30.00 (epoch 2)" in text and "90.00" not in text
    assert all(f"<small>note: {line.partition(': ')[2]}</small>" in text for line in output[:4])
    found = {run.name: run for run in read_runs(runs)}
    assert found["cut"].points("train", "loss", by_epoch=True) == [(0.5, 2.0), (1.0, None), (1.5, 2.0)]
    assert found["cut"].points("eval", "top1", by_epoch=True) == [(1.0, 20.0)]
    assert (found["none"].state, found["cut"].best, found["none"].best) == ("unknown", (20.0, 0), None)


def test_a_run_in_its_first_epoch_has_an_axis_of_steps(tmp_path):
    """How many steps the epoch has is not in its files."""
    report([write_run(tmp_path / "first", [train_line(0, 2)])], out=tmp_path / "page.html", model=False)
    text = (tmp_path / "page.html").read_text()
    assert "optimizer steps" in text and "epochs done" not in text and "it has no evaluation yet" in text
    assert "Left out: --no-model" in text


def test_a_summary_of_an_earlier_end_is_not_shown(tmp_path):
    for state, rate in (("running", "–"), ("finished", "123.4")):
        run = write_run(tmp_path / state, [eval_line(0, 5.0)], state)
        (run / "summary.json").write_text('{"train_images_per_sec": 123.4}')
        report([run], out=tmp_path / "page.html", model=False)
        assert f"<tr><td>training rate, images/s</td><td>{rate}</td></tr>" in (tmp_path / "page.html").read_text()


def test_what_is_wrong_is_said_in_one_line(tmp_path, capsys):
    run, damaged = write_run(tmp_path / "run"), write_run(tmp_path / "damaged")
    (damaged / "config.json").write_text("{}")
    cases = [
        ([tmp_path], {}, "is no output folder of a run: it has no config.json; name what -c named"),
        ([tmp_path / "nowhere"], {}, "is no output folder of a run"),
        ([run, run], {}, "is named twice: name each run once"),
        ([damaged], {}, "config.json is damaged: it holds no options of a run"),
        ([run], {"images": 0}, "--images 0: must be at least 1"),
        ([run], {"out": tmp_path / "no" / "page.html"}, f"no folder {tmp_path / 'no'} for page.html: make it first"),
        ([run], {"out": tmp_path}, "is a folder: name a file"),
    ]
    for runs, options, message in cases:
        with pytest.raises(SystemExit) as ended:
            report(runs, **{"out": tmp_path / "page.html", **options})
        assert str(ended.value).startswith("error: ") and message in ended.value.code and "\n" not in ended.value.code
    assert not (tmp_path / "page.html").exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    runs = [write_run(tmp_path / parent / "run") for parent in "ab"]
    assert [run.name for run in read_runs(runs)] == [str(run) for run in runs]
    assert len({colour(number) for number in range(40)}) == 40


# --- figures ---


def test_mistakes_and_spread_are_those_of_a_plain_computation(tiny, tmp_path):
    shape = {"arch": "mobilenetv2_dcd", "num_classes": 3, "width_mult": 0.1, "fc_squeeze": 16}
    torch.manual_seed(0)
    model = dcd.create_model("mobilenetv2_dcd", 3, width_mult=0.1, fc_squeeze=16)
    model.classifier.static_linear.weight.data.mul_(1e4)
    run = write_run(tmp_path / "run", data=tiny, eval_flip=True, **shape)
    config = Config().with_options(**shape, input_size=32, eval_crop=1.0, eval_flip=True)
    names = [folder.name for folder in sorted((tiny / "val").iterdir())]
    content = {"model": model.state_dict(), "classes": names, "architecture": config.model.architecture}
    (run / "checkpoints").mkdir()
    torch.save({**content, "preprocessing": config.preprocessing.to_dict()}, run / "checkpoints" / "best.pth")

    model.eval()
    set_path(model, "reference")
    kept = {name: [] for name, module in model.named_modules() if hasattr(module, "coefficients")}
    for name in kept:
        module = model.get_submodule(name)
        module.coefficients.register_forward_hook(lambda _, __, output, name=name: kept[name].append(output))
    data = DataConfig(tiny, "torchvision", batch_size=23, workers=0, eval_size=32)
    images, labels, _ = next(iter(build_loader(data, "val", augmentation=AugmentationConfig(eval_crop=1.0))))
    with torch.no_grad():
        logits = (model(images) + model(images.flip(3))) / 2
    confidences, answers = logits.softmax(1).max(1)
    order = [index for index in confidences.argsort(descending=True).tolist() if answers[index] != labels[index]]

    found = find_out(read_runs([run])[0], None, images=500, rows=2, shown=5)
    assert found.summary.top1 == pytest.approx(100 * (answers == labels).float().mean().item())
    assert found.spread_images == 23 and "23 images, each with its mirror image" in found.about
    assert [(each.label, each.answer) for each in found.mistakes] == [
        (names[labels[index]], names[answers[index]]) for index in order[:5]
    ]
    assert [each.probability for each in found.mistakes] == pytest.approx(confidences[order[:5]].tolist(), rel=1e-4)
    assert len(found.worst) == 2 and len(found.confused) == 2
    assert len(found.spread) == len(kept) > 20
    for layer in found.spread:
        phi, channel_scale = kept[layer.layer][0]  # of the images, not of their mirror images
        wanted = [values.double().std(0, correction=0).mean().item() for values in (phi, channel_scale)]
        assert [layer.phi, layer.channel_scale] == pytest.approx(wanted, rel=1e-3, abs=1e-6), layer.layer


def test_a_static_model_and_data_elsewhere(tiny, tmp_path, capsys):
    run = write_run(tmp_path / "run", data=tmp_path / "gone")
    model = dcd.create_model("mobilenetv2", 3, width_mult=0.1)
    shape = {"arch": "mobilenetv2", "num_classes": 3, "width_mult": 0.1}
    (run / "checkpoints").mkdir()
    classes = [folder.name for folder in sorted((tiny / "val").iterdir())]
    content = {"model": model.state_dict(), "classes": classes, "architecture": shape}
    torch.save(content, run / "checkpoints" / "best.pth")
    report([run], out=tmp_path / "page.html")
    assert (
        f"left out: its data, {tmp_path / 'gone'}, is not there; --data names another place" in capsys.readouterr().out
    )
    report([run], out=tmp_path / "page.html", data=tiny)
    text = (tmp_path / "page.html").read_text()
    assert "left out: its model has no dynamic layers" in text and f"23 images in {tiny}" in text


# --- curves ---


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (1.98, 2.03), (-3.0, 250.0), (0.0, 4e-5), (7.0, 90_000.0)])
def test_ticks_are_round_and_within_the_axis(low, high):
    ticks = Axis(low, high, 0, 100).ticks
    assert 3 <= len(ticks) <= 11 and low - 1e-9 <= ticks[0] and ticks[-1] <= high + 1e-9
    step = ticks[1] - ticks[0]
    assert f"{step / 10 ** math.floor(math.log10(step) + 1e-9):.3f}" in ("1.000", "2.000", "5.000")
    assert 2 <= len(Axis(math.log10(3), math.log10(4000), 0, 100, is_log=True).ticks) <= 7


def test_a_curve_with_gaps_and_one_of_many_points():
    points = [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 2.0), (4.0, 500.0)]
    drawn = chart("Loss & more", "", "epochs", [Curve("a<b", "#123456", points)], (0.0, 4.0), may_be_log=True)
    assert drawn.count("<polyline") == 2 and drawn.count("no finite number") == 1
    assert "Loss &amp; more (logarithmic)" in drawn and "a&lt;b" in drawn and "a<b" not in drawn
    assert "logarithmic" not in chart("Loss", "", "epochs", [Curve("a", "red", points[:2])], (0.0, 4.0), True)
    assert "No run has logged it" in chart("Loss", "", "epochs", [Curve("a", "red", [(0.0, None)])], (0.0, 4.0))
    many = [(float(i), None if i % 2 else float(i)) for i in range(10 * MOST_POINTS)]
    assert len(thin(many)) == MOST_POINTS and thin(many)[0] == (4.5, 4.0)
