"""`tools.predict`: the probabilities of the run's evaluation, for files of every kind."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dcd
from pipelines.build import build_loader
from pipelines.config import AugmentationConfig, DataConfig
from tests.jpegs import smooth
from tools.checkpoint_options import SAYS_ALL, CheckpointOptions
from tools.predict import Names, main, read_ahead

ROOT = Path(__file__).parents[2]
NAMES = ["ant", "bee", "cat"]
SIZES = {"width_mult": 0.1, "fc_squeeze": 16}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A folder of val/CLASS with a picture of every kind."""
    root = tmp_path_factory.mktemp("pictures")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to show
    for number, (name, mode, options) in enumerate(
        [
            ("ant/plain.JPEG", "RGB", {}),
            ("ant/grey.jpg", "L", {}),
            ("ant/cmyk.jpg", "CMYK", {}),
            ("ant/turned.jpg", "RGB", {"exif": exif}),
            ("bee/transparent.png", "RGBA", {}),
            ("bee/palette.gif", "P", {}),
            ("bee/16 bits.png", "I;16", {}),
            ("cat/progressive.jpeg", "RGB", {"progressive": True}),
            ("cat/a.webp", "RGB", {}),
        ]
    ):
        path = root / "val" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = smooth(60 + number, 100 - 5 * number, seed=number, step=16)
        if mode == "I;16":
            Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(path)
        else:
            Image.fromarray(pixels).convert(mode).save(path, **options)
    return root


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The output folder of a run, as far as it is read: a model whose answers differ from picture to picture."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(1)
    state = dcd.create_model("mobilenetv2_dcd", 3, **SIZES).state_dict()
    state["classifier.static_linear.weight"] *= 3000
    preprocessing = dcd.Preprocessing(48, 0.8).to_dict()
    content = {"best": "model", "model": state, "classes": NAMES, "preprocessing": preprocessing}
    content["architecture"] = {"arch": "mobilenetv2_dcd", "num_classes": 3, **SIZES}
    (folder / "checkpoints").mkdir()
    torch.save(content, folder / "checkpoints" / "best.pth")
    return folder


@pytest.fixture
def predict(capsys):
    """`main`: (what it says or the exit code, standard output, standard error)."""

    def call(*args, **options) -> tuple[str | None, str, str]:
        ended = None
        network = CheckpointOptions(**{name: options.pop(name) for name in vars(SAYS_ALL) if name in options})
        try:
            main(*args, network=network, **{"device": "cpu", **options})
        except SystemExit as error:
            ended = error.code
        return ended, *capsys.readouterr()

    return call


@pytest.mark.parametrize(("fold", "flip"), [(True, False), (False, True)])
def test_predictions_are_those_of_the_evaluation(run, pictures, predict, tmp_path, fold, flip):
    """Of every kind of picture, in order, in batches that are not full; by --eval-flip where the run had it."""
    checkpoint = torch.load(run / "checkpoints" / "best.pth")
    checkpoint["preprocessing"]["flip"] = flip
    run = tmp_path / "best.pth"
    torch.save(checkpoint, run)
    loader = build_loader(
        DataConfig(pictures, "torchvision", batch_size=9, workers=0, eval_size=48),
        "val",
        augmentation=AugmentationConfig(eval_crop=0.8),
    )
    (batch,) = list(loader)
    paths = [loader.name(index) for index in batch.indices.tolist()]
    loader.close()
    model = dcd.load(run)
    assert model.preprocessing.flip == flip
    with torch.no_grad():
        logits = model(batch.images)
        expected = ((logits + model(batch.images.flip(3))) / 2 if flip else logits).softmax(1)
    assert expected.std(0).max() > 0.05, "the answers differ"

    target = tmp_path / "found.json"
    ended, out, err = predict(run, [pictures / "val"], json_file=target, batch_size=4, fold=fold)
    said = "each picture is taken with its mirror image, as its run did: --eval-flip no halves the work\n"
    assert (ended, out, err) == (None, "", said if flip else "")
    found = json.loads(target.read_text())
    assert [record["image"] for record in found] == paths
    for record, probabilities in zip(found, expected, strict=True):
        order = [each["index"] for each in record["top"]]
        assert order == probabilities.argsort(descending=True).tolist(), "all three of --top 5"
        assert [each["class"] for each in record["top"]] == [NAMES[index] for index in order]
        assert [each["probability"] for each in record["top"]] == pytest.approx(probabilities[order].tolist(), abs=1e-4)


def test_what_is_no_picture_is_named_and_the_others_go_on(run, pictures, predict, tmp_path):
    whole = pictures / "val" / "ant" / "plain.JPEG"
    (tmp_path / "in").mkdir()
    for name, content in (
        ("a truncated.jpg", whole.read_bytes()[:-300]),
        ("b page.jpg", b"<html>not found</html>"),
        ("c empty.png", b""),
        ("d notes.txt", b"notes"),
        ("e whole.jpg", whole.read_bytes()),
    ):
        (tmp_path / "in" / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe.jpg")
    arguments = [tmp_path / "in", tmp_path / "pipe.jpg", tmp_path / "nowhere.jpg", tmp_path / "in" / "d*", whole]
    ended, out, err = predict(run, arguments, top=1, batch_size=2)
    assert ended == "error: 6 of 8 pictures got no prediction"
    lines = err.splitlines()
    assert "left out 1 file that is no image by its name (1 .txt)" in lines[0]
    for line, (name, reason) in zip(
        lines[1:],
        [
            ("in/a truncated.jpg", "does not decode ("),
            ("in/b page.jpg", "does not decode (not an image that Pillow knows)"),
            ("in/c empty.png", "does not decode (the file is empty)"),
            ("pipe.jpg", "is no file"),
            ("nowhere.jpg", "does not exist"),
            ("in/d notes.txt", "does not decode ("),
        ],
        strict=True,
    ):
        assert line.startswith(f"{tmp_path / name} {reason}")
    first, answer, second, again = out.splitlines()
    assert (first, second) == (str(tmp_path / "in" / "e whole.jpg"), str(whole)) and answer == again
    assert answer.split()[1:] == ["%", answer.split()[-1]] and answer.split()[-1] in NAMES

    ended, _, _ = predict(run, arguments[:3], json_file=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    assert ended and [("top" in record, "error" in record) for record in found] == [(False, True)] * 3 + [
        (True, False), (False, True), (False, True)
    ]  # fmt: skip


@pytest.mark.gpu
def test_a_gpu_gives_the_same(run, pictures, predict, tmp_path, exact_float32):
    for device in ("cuda", "cpu"):
        ended, _, err = predict(run, [pictures / "val"], json_file=tmp_path / device, device=device)
        assert (ended, err) == (None, "")
    found, expected = (json.loads((tmp_path / device).read_text()) for device in ("cuda", "cpu"))
    for one, other in zip(found, expected, strict=True):
        of_class = [{each["class"]: each["probability"] for each in record["top"]} for record in (one, other)]
        assert of_class[0] == pytest.approx(of_class[1], abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(run, pictures, predict):
    ended, _, _ = predict(run, [pictures], device="cuda")
    assert ended == "error: --device cuda: PyTorch finds no GPU here: leave it out to compute on the CPU"


def test_bad_input_is_one_line(run, pictures, predict, tmp_path):
    (tmp_path / "none").mkdir()
    for arguments, options, message in (
        ([run, [tmp_path / "none"]], {}, "/none holds no images; there is no image: name files, folders or patterns"),
        ([run, []], {}, "error: there is no image: name files, folders or patterns"),
        ([tmp_path / "x.pth", [pictures]], {}, "error: no checkpoint at "),
        ([run, [pictures]], {"arch": "resnet18"}, "is of arch mobilenetv2_dcd, not resnet18"),
        ([run, [pictures]], {"top": 0}, "error: --top 0: it must be at least 1"),
        ([run, [pictures]], {"json_file": tmp_path / "nowhere" / "x.json"}, f"error: no folder {tmp_path / 'nowhere'}"),
    ):
        ended, out, _ = predict(*arguments, **options)
        assert message in ended and ended.startswith("error: ") and "\n" not in ended and out == "", ended
    assert [path.name for path in tmp_path.iterdir()] == ["none"]


def test_a_model_without_numbers_is_not_believed(run, pictures, predict, tmp_path):
    content = torch.load(run / "checkpoints" / "best.pth", weights_only=True)
    content["model"]["stem_bn.bias"][0] = torch.nan
    torch.save(content, tmp_path / "nan.pth")
    ended, out, err = predict(tmp_path / "nan.pth", [pictures / "val" / "cat"])
    assert ended == "error: 2 of 2 pictures got no prediction" and out == ""
    assert err.count("gets no finite output from the model") == 2


def test_names_of_classes(monkeypatch):
    named = Names(["ant", "bee"], 2)
    assert named.note is None and named.of(1) == {"index": 1, "class": "bee"}
    imagenet = Names(None, 1000)
    assert "taken for ImageNet's, in the order of their WordNet ids" in imagenet.note
    tench = {"index": 0, "class": "n01440764", "description": "tench, Tinca tinca"}
    assert imagenet.of(0) == tench
    ids = [imagenet.of(index)["class"] for index in range(1000)]
    assert ids == sorted(set(ids)), "as the loaders number the folders"
    assert Names(["n00000000", "n01440764"], 2).of(1) == {**tench, "index": 1}
    assert Names(["n00000000", "n01440764"], 2).of(0) == {"index": 0, "class": "n00000000"}
    numbered = Names(None, 7)
    assert numbered.note == "the model does not name its classes: they are numbered" and numbered.of(6) == {"index": 6}
    monkeypatch.setitem(sys.modules, "timm.data", None)
    assert Names(None, 1000).note.endswith("they are numbered; pip install timm for ImageNet's names")


def test_only_so_many_are_read_ahead():
    """In order, whatever their number: memory does not grow with it."""
    started, lock, furthest = 0, threading.Lock(), 0

    def read(path: Path) -> str:
        nonlocal started
        with lock:
            started += 1
        return f"read {path}"

    paths = [Path(str(number)) for number in range(300)]
    for done, (path, found) in enumerate(read_ahead(paths, read, ahead=5)):
        assert path == paths[done] and found == f"read {path}"
        furthest = max(furthest, started - done)
    assert started == 300 and 1 <= furthest <= 6


def test_by_its_command(run, pictures):
    command = ["tools.predict", run, pictures / "val" / "b*" / "*.png", "--top", 2, "--json", "-", "--device", "cpu"]
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [Path(record["image"]).name for record in found] == ["16 bits.png", "transparent.png"]
    assert all(len(record["top"]) == 2 for record in found)
