"""The sample dataset: right digits in ImageNet's layout; nothing that is there already is harmed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from tools.make_sample import make_sample

ROOT = Path(__file__).parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "tools.make_sample", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_the_numbers_of_images_and_classes(digits):
    for split, count in (("train", 1437), ("val", 360)):
        folders = sorted((digits / split).iterdir())
        assert [folder.name[0] for folder in folders] == list("0123456789")  # so the class id is the digit
        assert sum(len(list(folder.glob("*.JPEG"))) for folder in folders) == count
        assert min(len(list(folder.iterdir())) for folder in folders) >= count // 15
    names = [sorted(folder.name for folder in (digits / split).iterdir()) for split in ("train", "val")]
    assert names[0] == names[1]


def test_train_and_val_share_no_image(digits):
    train, val = ({file.name for file in (digits / split).rglob("*.JPEG")} for split in ("train", "val"))
    assert not train & val and len(train | val) == 1797


def test_every_image_shows_its_scan_and_lies_in_its_class(digits):
    data = load_digits()
    for file in digits.rglob("*.JPEG"):
        number = int(file.stem.removeprefix("digit_"))
        with Image.open(file) as image:
            assert image.size == (64, 64) and image.mode == "RGB" and image.format == "JPEG"
            small = np.asarray(image.convert("L"), float).reshape(8, 8, 8, 8).mean((1, 3))  # mean of each 8x8 block
        assert np.corrcoef(small.ravel(), data.images[number].ravel())[0, 1] > 0.95, file
        assert file.parent.name[0] == str(data.target[number])


def test_a_sample_that_is_there_is_left_alone(tmp_path, capsys):
    kept = tmp_path / "train" / "kept.txt"
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    kept.write_text("mine")
    make_sample(tmp_path)
    assert "is there already" in capsys.readouterr().out
    assert kept.read_text() == "mine" and len(list(tmp_path.rglob("*"))) == 3


def test_the_command_writes_a_whole_sample_into_an_empty_folder_once(tmp_path):
    out = tmp_path / "empty"
    out.mkdir()
    done = run(out)
    assert (done.returncode, done.stdout) == (0, f"wrote 1797 images to {out}\n"), done.stderr
    times = {file: file.stat().st_mtime_ns for file in out.rglob("*.JPEG")}
    assert len(times) == 1797
    done = run(out)
    assert done.returncode == 0 and "is there already" in done.stdout
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.JPEG")} == times
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]  # no temporary folder is left


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_something_else_in_the_place_is_refused_in_one_line_and_kept(tmp_path, kind):
    out = tmp_path / "out"
    mine = out / "mine.txt" if kind == "folder" else out
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    done = run(out)
    assert done.returncode != 0 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and str(out) in done.stderr
    assert mine.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["out"]
