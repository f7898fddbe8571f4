"""The profiler of throughput: figures of real runs on the digits, and the feed between loader and trainer."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.batch import Place
from pipelines.build import build_loader
from pipelines.config import DataConfig
from pipelines.sources.errors import DataError
from tests import helpers
from tests.pipelines.helpers import converted, indices_of
from tools.profile_throughput import main
from tools.profiling.feed import Feed, Window
from training.options import ConfigError
from training.profile.step_timer import PHASES

ROOT = Path(__file__).parents[2]
MODEL = "-a mobilenetv2_dcd --width-mult 0.1 --fc-squeeze 16"
SMALL = f"{MODEL} --input-size 32 -b 12 -j 2 --window-steps 2".split()
SYNTHETIC = ["--backend", "synthetic", "--synthetic-images", "240", "--num-classes", "3"]


def run(*args, fails: bool = False) -> tuple[str, str]:
    """Standard output and error of the program."""
    command = [sys.executable, "-m", "tools.profile_throughput", *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=env)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def tiny(digits, tmp_path_factory) -> Path:
    """A corner of the digits: three classes, 48 images to train and 24 to evaluate, four steps and two."""
    out = tmp_path_factory.mktemp("tiny")
    for split, count in (("train", 16), ("val", 8)):
        for folder in sorted((digits / split).iterdir())[:3]:
            (out / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, out / split / folder.name)
    return out


def check(path: Path, windows: int) -> dict:
    """The figures in a file, which must be whole."""
    found = json.loads(path.read_text())
    assert found["images_per_sec"].keys() == {"train", "eval"}
    for mode, rates in found["images_per_sec"].items():
        assert rates.keys() == {"loader", "model", "together"}
        for part, median in rates.items():
            each = found["images_per_sec_of_windows"][mode][part]
            assert len(each) == windows and median == statistics.median(each) and min(each) > 0
    shares = found["train_step"]["shares"]
    assert tuple(shares) == PHASES and sum(shares.values()) == pytest.approx(1)
    assert shares["forward"] > 0.05 and shares["backward"] > 0.05 and min(shares.values()) >= 0
    assert found["train_step"]["steps"] == 2 * windows
    assert {"config", "command", "device", "versions", "git_commit"} <= found.keys()
    return found


def test_folder_of_images_with_a_trace(tiny, tmp_path):
    paths = ["--windows", 2, "--json", tmp_path / "found.json", "--trace", tmp_path / "trace.json"]
    output, _ = run(*SMALL, "-d", tiny, "-c", tmp_path / "out", "--mixup", 0.2, "--ema", 0.9, *paths)
    found = check(tmp_path / "found.json", windows=2)
    assert found["train_step"]["shares"]["reduce"] == 0
    for words in ("| images/s | loader alone | model alone | together |", "| training |", "| evaluation |"):
        assert words in output
    assert output.splitlines()[-1] == found["verdict"]
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("forward") == 3, "a few steps"
    assert not (tmp_path / "out").exists(), "a measurement is no run"


def test_several_ranks(tmp_path):
    args = [*SMALL, *SYNTHETIC, "--windows", 1, "--json", tmp_path / "found.json"]
    output = helpers.run(*args, ranks=2, module="tools.profile_throughput")
    found = check(tmp_path / "found.json", windows=1)
    assert found["world_size"] == 2 and found["train_step"]["shares"]["reduce"] > 0
    assert output.count("| training |") == output.count(found["verdict"]) == 1, "rank 0 speaks"
    # what reads nothing is no bound
    assert found["images_per_sec"]["train"]["loader"] > found["images_per_sec"]["train"]["model"]


def test_converted_images(tiny, tmp_path, capsys):
    data = converted(tiny, tmp_path / "converted")
    args = ["-d", str(data), "--backend", "ffcv", "--no-channels-last", "--windows", "1"]
    main([*SMALL, *args, "--json", str(tmp_path / "found.json")])
    found = check(tmp_path / "found.json", windows=1)
    assert found["config"]["backend"] == "ffcv" and capsys.readouterr().out.endswith(f"{found['verdict']}\n")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--wrong"], "Unrecognized options: --wrong"),
        (["-d", "/nowhere"], "no folder /nowhere/val"),
        (["--windows", "0"], "--windows 0: must be at least 1"),
        (["--window-steps", "0"], "--window-steps 0: must be at least 1"),
        (["--json", "/nowhere/found.json"], "--json /nowhere/found.json: must be a file in a folder that exists"),
        (["--cuda-graphs"], "--cuda-graphs: a graph has no phases to time: leave it out"),
        (["--dry-run"], "--dry-run is of train_dist.py: leave it out"),
        (["--trace", "/"], "--trace /: must be a file in a folder that exists"),
        (["-a", "mobilenetv2_dc"], "unknown model 'mobilenetv2_dc'"),
        (["--synthetic-images", "8"], "8 training images do not fill one batch of 12"),
    ],
)
def test_what_is_wrong(args, message):
    with pytest.raises((ConfigError, DataError), match=message) as error:
        main([*SMALL, *([] if "-d" in args else SYNTHETIC), *args])
    assert "\n" not in str(error.value)


def test_an_error_is_one_line():
    output, errors = run("--batch-size", "many", fails=True)
    assert output == "" and errors.startswith("rank 0: error: ") and errors.count("\n") == 1


def test_the_feed_goes_on_behind_what_it_has_handed_out(digits):
    """Over the end of an epoch, after a rest and after an epoch that was left early: no image twice, none left out."""
    config = DataConfig(digits, "torchvision", batch_size=400, workers=1, input_size=32)
    loader, expected = build_loader(config, "train"), build_loader(config, "train")
    feed = Feed(loader, epoch=3)
    order = indices_of(expected_batches(expected, epochs=(3, 4)))
    assert indices_of([feed.first]) == order[:400]
    found = []
    for steps in (1, 3):  # three steps are an epoch
        window = Window(iter(feed), steps)
        found += indices_of(window)
        assert window.images == steps * 400
        feed.rest()
        assert loader._running is None or loader._running.gi_frame is None, "nothing works ahead"
    assert found == order[400:2000]
    loader.close(), expected.close()


def expected_batches(loader, epochs):
    for epoch in epochs:
        loader.set_epoch(epoch)
        yield from loader


def test_a_rank_without_images():
    config = DataConfig(backend="synthetic", batch_size=12, synthetic_images=20, synthetic_classes=3)
    with pytest.raises(ConfigError, match="rank 0 gets none of 2 images: use fewer ranks"):
        Feed(build_loader(config, "val", Place(0, 3)), 0)
