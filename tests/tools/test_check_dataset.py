"""What `tools.check_dataset` finds in datasets with and without faults."""

import base64
import io
import json
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.sources.beton import BetonSource
from tests.pipelines.helpers import converted
from tools.check_dataset import main

ROOT = Path(__file__).parents[2]


def picture(path: Path, seed: int, kind: str = "JPEG", mode: str = "RGB", **options) -> np.ndarray:
    """Write noise, and return the pixels as they are read."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed % 5, 30, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, kind, **options)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, first in (("train", 0), ("val", 100)):
        for number in range(12):
            picture(tmp_path / "data" / split / f"class {number % 3}" / f"{number}.JPEG", first + number)
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path, capsys):
    """`main`: (exit code, what it prints, its JSON)."""

    def run(path: Path, **options) -> tuple[int, str, dict]:
        code = 0
        try:
            main(path, json_file=tmp_path / "report.json", workers=2, **options)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out, json.loads((tmp_path / "report.json").read_text())

    return run


def test_a_sound_dataset_and_its_figures(data, run):
    code, text, found = run(data)
    assert code == 0 and text.endswith("nothing wrong was found\n")
    train = found["splits"]["train"]
    assert train["images"] == 12 and train["images_of_class"] == {"class 0": 4, "class 1": 4, "class 2": 4}
    assert train["heights_widths"] == {"least": [20, 30], "most": [24, 30]} and train["layouts"] == {"JPEG, 4:2:0": 12}
    assert train["bytes"] == sum(file.stat().st_size for file in (data / "train").rglob("*.JPEG"))
    pixels = np.concatenate(
        [np.asarray(Image.open(file), float).reshape(-1, 3) for file in (data / "train").rglob("*.JPEG")]
    )
    np.testing.assert_allclose(train["mean"], pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(train["std"], pixels.std(0), rtol=1e-9)
    assert "train: 12 images of 3 classes" in text and "val: 12 images" in text


def test_what_is_damaged_odd_twice_or_left_out_is_named(data, run):
    truncated = data / "train" / "class 0" / "0.JPEG"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    picture(data / "train" / "class 1" / "cmyk.JPEG", 50, mode="CMYK")
    picture(data / "val" / "class 1" / "a.png", 51, "PNG", mode="RGBA")
    picture(data / "val" / "class 2" / "progressive.JPEG", 52, progressive=True, subsampling="4:2:2")
    (data / "val" / "class 0" / "leak.JPEG").write_bytes((data / "train" / "class 1" / "1.JPEG").read_bytes())
    (data / "train" / "class 2" / "twin.JPEG").write_bytes((data / "train" / "class 2" / "2.JPEG").read_bytes())
    (data / "train" / "class 2" / "notes.txt").write_text("no image")
    code, text, found = run(data)
    train, val = found["splits"]["train"], found["splits"]["val"]
    assert code == 1 and "nothing wrong" not in text
    (damaged,) = train["damaged"]
    assert damaged["name"] == str(truncated) and "does not decode" in damaged["reason"] and damaged["reason"] in text
    assert [image["what"] for image in train["converted"] + val["converted"]] == ["JPEG, CMYK", "PNG, RGBA"]
    assert val["layouts"] == {"JPEG, 4:2:0": 13, "PNG, RGBA": 1, "JPEG, 4:2:2, progressive": 1}
    assert train["twins"] == [[str(data / "train" / "class 2" / name) for name in ("2.JPEG", "twin.JPEG")]]
    assert found["in_both_splits"] == [
        [str(data / "train" / "class 1" / "1.JPEG"), str(data / "val" / "class 0" / "leak.JPEG")]
    ]
    assert "left out 1 file that is no image by its name (1 .txt)" in train["left_out"]
    assert "notes.txt" in text and "leak.JPEG" in text


def test_files_that_are_no_images_are_named_among_the_damaged(data, run):
    bad = [data / "train" / f"class {number}" / "bad.JPEG" for number in range(3)]
    for file, content in zip(bad, (b"", b"<html>", b"\xff\xd8\xff\xe0"), strict=True):
        file.write_bytes(content)
    for file in (data / "val").rglob("*.JPEG"):
        file.write_bytes(b"nothing left")
    code, text, found = run(data)
    assert code == 1 and found["splits"]["train"]["layouts"] == {"JPEG, 4:2:0": 12}
    assert [image["name"] for image in found["splits"]["train"]["damaged"]] == [str(file) for file in bad]
    assert len(found["splits"]["val"]["damaged"]) == 12 and "width × height: none" in text
    assert "not an image that Pillow knows" in text and "the file is empty" in text


def test_a_jpeg_whose_header_pillow_does_not_know_is_an_image_on_every_path(data, run, tmp_path):
    file = data / "train" / "class 0" / "0.JPEG"
    whole = file.read_bytes()
    odd = whole[:2] + b"\xff\xe0\0\6JFIF" + whole[2:]
    file.write_bytes(odd)
    with pytest.raises(OSError):
        Image.open(io.BytesIO(odd))
    for path in (data, converted(data, tmp_path / "out")):
        code, _, found = run(path)
        layouts = {"JPEG, 4:2:0": 11, "JPEG, a header that Pillow does not know": 1}
        assert code == 0 and found["splits"]["train"]["layouts"] == layouts


def test_a_split_that_is_missing_and_a_folder_that_is_missing_are_said(data, run, tmp_path):
    with pytest.raises(SystemExit, match="error: no folder .*nowhere for page.html: make it first"):
        main(data, html=tmp_path / "nowhere" / "page.html")
    shutil.rmtree(data / "val")
    code, text, _ = run(data)
    assert code == 1 and "there is no val: a training needs both" in text and "nothing wrong" not in text


def test_classes_that_differ_are_wrong(data, run):
    picture(data / "val" / "class 3" / "a.JPEG", 60)
    code, text, found = run(data)
    assert code == 1 and found["classes_in_one_split"] == ["class 3"] and "class 3" in text


@pytest.mark.parametrize("raw", [False, True])
def test_a_beton_file_and_a_byte_that_has_changed(data, tmp_path, run, raw):
    options = {"mode": "reencode", "jpeg_fraction": 0} if raw else {}
    beton = converted(data, tmp_path / "out", **options) / "train.beton"
    code, _, found = run(tmp_path / "out")
    assert code == 0 and found["splits"]["train"]["layouts"] == {"pixels" if raw else "JPEG, 4:2:0": 12}
    source = BetonSource(beton)
    place = int(source.offsets[5] + source.lengths[5] // 2)
    with open(beton, "r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))
    code, text, found = run(beton)  # the file alone
    assert code == 1 and list(found["splits"]) == ["train"]
    (damaged,) = found["splits"]["train"]["damaged"]
    assert damaged["name"] == f"image 5 of {beton}" and "not those that were converted" in text


class Page(HTMLParser):
    """Headings and images of a page, whose elements are all closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.headings, self.images = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open[-1:] == ["h2"]:
            self.headings.append(text)


def test_the_page_of_thumbnails(data, tmp_path, run):
    (data / "train" / "class 0").rename(data / "train" / "<b>&")
    (data / "val" / "class 0").rename(data / "val" / "<b>&")
    picture(data / "train" / "class 1" / 'cmyk " quoted.JPEG', 50, mode="CMYK")
    assert run(data, html=tmp_path / "page.html", per_class=3)[0] == 0
    page = Page((tmp_path / "page.html").read_text())
    classes = [f"{split} · {name} · " for split in ("train", "val") for name in ("<b>&", "class 1", "class 2")]
    assert page.headings[0] == "converted when they are read, in train: 1"
    assert [heading.rstrip("0123456789") for heading in page.headings[1:]] == classes
    assert len(page.images) == 1 + 3 * 6 and 'cmyk " quoted.JPEG' in page.images[0]["title"]
    for image in page.images:
        kind, _, code = image["src"].partition(";base64,")
        with Image.open(io.BytesIO(base64.b64decode(code))) as thumbnail:
            assert kind == "data:image/jpeg" and thumbnail.size == (int(image["width"]), int(image["height"]))
    assert "http" not in (tmp_path / "page.html").read_text()


def test_bad_input_is_one_line(tmp_path):
    command = [sys.executable, "-m", "tools.check_dataset", str(tmp_path / "nowhere")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: no folder ") and done.stderr.count("\n") == 1
