"""The library of `tools.evaluate`: figures beside plain slow computations, kinds of data by what lies in a folder."""

import json
import math
import pkgutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from dcd.checkpoint_file import CheckpointError
from pipelines.sources.errors import DataError
from tools.evaluation import figures
from tools.evaluation.kinds import (
    IMAGENET,
    IMAGENET_A,
    IMAGENET_R,
    Part,
    find_parts,
    fingerprint,
    imagenet_ids,
    in_words,
    match,
)
from tools.evaluation.real import labels_of, read_real
from tools.evaluation.records import Records
from training.classes import Classes
from training.options import ConfigError

CLASSES = 7
NAMES = [f"class {label}" for label in range(CLASSES)]


@pytest.fixture(scope="module")
def batches() -> list[tuple]:
    """300 images in shuffled order: indices, labels, logits. Two have logits that are no finite numbers."""
    torch.manual_seed(0)
    indices, labels, logits = torch.randperm(300), torch.randint(CLASSES, (300,)), 3 * torch.randn(300, CLASSES)
    logits[labels == 3, 3] += 3
    labels[labels == 6] = 5  # a class without images
    logits[7, 2], logits[250, 0] = torch.inf, torch.nan
    return list(zip(*(each.split(64) for each in (indices, labels, logits)), strict=True))


@pytest.fixture(scope="module")
def answers(batches):
    records = Records()
    for batch in batches:
        records.collect(*batch)
    return records.gather(300, torch.device("cpu"))


def test_records_are_in_the_order_of_the_dataset(batches, answers):
    indices, labels, logits = (torch.cat(each) for each in zip(*batches, strict=True))
    for place, index in enumerate(indices.tolist()):
        assert answers.labels[index] == labels[place]
        if place in (7, 250):
            assert (answers.top[index] == -1).all() and math.isnan(answers.confidences[index])
        else:
            assert answers.top[index].tolist() == logits[place].argsort(descending=True)[:5].tolist()
            assert answers.confidences[index] == pytest.approx(logits[place].softmax(0).max().item())


def test_an_image_that_is_counted_twice_or_not_at_all_is_noticed(batches):
    records = Records()
    with pytest.raises(RuntimeError, match="twice, or not at all"):
        records.gather(300, torch.device("cpu"))
    for batch in [*batches, batches[0]]:
        records.collect(*batch)
    with pytest.raises(RuntimeError, match="twice, or not at all"):
        records.gather(300, torch.device("cpu"))


def test_a_model_of_few_classes():
    records = Records()
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    records.collect(torch.tensor([0]), torch.tensor([2]), logits)
    answers = records.gather(1, torch.device("cpu"))
    assert answers.top.tolist() == [[1, 2, 0, -1, -1]] and answers.hits.tolist() == [[False, True, False, False, False]]


def plain_calibration(pairs: list[tuple[float, bool]]) -> float:
    """By the definition, image by image."""
    error = 0.0
    for number in range(15):
        inside = [(c, right) for c, right in pairs if number / 15 < c <= (number + 1) / 15]
        if inside:
            confidence = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(right for _, right in inside) / len(inside)
            error += len(inside) / len(pairs) * abs(accuracy - confidence)
    return 100 * error


def test_calibration(answers):
    found = figures.calibration(answers.confidences, answers.hits[:, 0])
    pairs = zip(answers.confidences.tolist(), answers.hits[:, 0].tolist(), strict=True)
    pairs = [pair for pair in pairs if not math.isnan(pair[0])]
    assert found["ece"] == pytest.approx(plain_calibration(pairs)) and found["ece"] > 1
    assert found["images"] == 298 == sum(each["images"] for each in found["bins"])
    last = found["bins"][-1]
    inside = [pair for pair in pairs if pair[0] > 14 / 15]
    assert last["images"] == len(inside) > 0 and (last["from"], last["to"]) == (pytest.approx(1400 / 15), 100)
    assert last["accuracy"] == pytest.approx(100 * sum(right for _, right in inside) / len(inside))
    assert math.isnan(found["bins"][0]["confidence"]), "of seven classes none has so little"


def test_classes_and_confusion(answers):
    pairs = list(zip(answers.labels.tolist(), answers.top.tolist(), strict=True))
    counts = Counter((label, top[0]) for label, top in pairs if top[0] >= 0)
    found = figures.confusion(answers, CLASSES)
    assert {(label, answer): images for label, answer, images in found} == counts
    assert [row[2] for row in found] == sorted(counts.values(), reverse=True)
    rows = {row["class"]: row for row in figures.per_class(answers, NAMES)}
    assert list(rows) == NAMES[:6], "a class without images has no accuracy"
    for label in range(6):
        tops = [top for each, top in pairs if each == label]
        row = rows[NAMES[label]]
        assert row["images"] == len(tops)
        assert row["top1"] == pytest.approx(100 * sum(label == top[0] for top in tops) / len(tops))
        assert row["top5"] == pytest.approx(100 * sum(label in top for top in tops) / len(tops))


def test_reassessed_labels(answers):
    generator = torch.Generator().manual_seed(0)
    labels = [
        torch.randperm(CLASSES, generator=generator)[: index % 4].tolist() + [figures.NO_OUTPUT] * (index % 5 == 1)
        for index in range(300)
    ]
    found = figures.reassessed(answers, labels)
    kept = [(set(each), top) for each, top in zip(labels, answers.top.tolist(), strict=True) if each]
    assert found["images"] == len(kept) and found["without_labels"] == 300 - len(kept) > 0
    assert found["top1"] == pytest.approx(100 * sum(top[0] in each for each, top in kept) / len(kept))
    assert found["top5"] == pytest.approx(100 * sum(bool(each & set(top)) for each, top in kept) / len(kept))


def test_corruption_errors():
    whole = {name: dict.fromkeys(range(1, 6), 100 - error) for name, error in figures.ALEXNET.items()}
    found = figures.corruption_errors({**whole, "spatter": {1: 50.0}})
    assert found["mce"] == pytest.approx(100), "AlexNet by itself"
    assert found["mean_error"] == pytest.approx(sum(figures.ALEXNET.values()) / 15)
    assert (found["missing"], found["extra"]) == ([], ["spatter"])
    whole["fog"] = {1: 50.0, 2: 30.0, 5: 10.0}
    del whole["snow"]
    found = figures.corruption_errors(whole)
    assert found["mce"] is None and found["missing"] == ["snow", "fog 3", "fog 4"]
    assert found["error"]["fog"] == pytest.approx(70)
    assert figures.corruption_errors({"spatter": {1: 50.0}})["mean_error"] is None


def ids_of(name: str) -> list[str]:
    return pkgutil.get_data("timm.data", f"_info/{name}_synsets.txt").decode().split()


def test_the_sets_of_ids_are_those_that_timm_lists():
    for name, expected in (("imagenet", IMAGENET), ("imagenet_a", IMAGENET_A), ("imagenet_r", IMAGENET_R)):
        assert fingerprint(reversed(ids_of(name))) == expected
    assert imagenet_ids() == ids_of("imagenet") == imagenet_ids(Classes(3), Classes(1000, ids_of("imagenet")[::-1]))
    assert in_words(["n01440764", "cat"]) == {"n01440764": "tench, Tinca tinca"}


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ConfigError, match="names ImageNet's 1000 classes; timm does: pip install 'timm>=1.0.31'"):
        match("auto", "p.pth", SOME, NUMBERS)
    assert imagenet_ids(Classes(1000, IDS)) == IDS and in_words(IDS) == {}
    assert match("auto", "p.pth", Classes(1000), Classes(1000, IDS)).names == IDS


IDS = ids_of("imagenet")
SOME = Classes(5, [IDS[number] for number in (10, 2, 0, 999, 1)])  # a model that knows five, in an order of its own
NUMBERS = Classes(4, ["0", "1", "10", "2"])  # as folders sort


def test_numbers_are_positions_among_the_ids_and_not_among_the_folders():
    found = match("auto", "p.pth", SOME, NUMBERS)
    assert (found.kind, found.outputs, found.names, found.restricted) == (
        "imagenet-v2",
        [2, 4, 0, 1],
        SOME.names,
        False,
    )
    assert found.notes[0].startswith("imagenet-v2: the data's classes are numbers, positions among ImageNet's sorted")
    everything = Classes(1000, sorted(map(str, range(1000))))
    found = match("auto", "p.pth", Classes(1000), everything)  # an official checkpoint
    assert found.outputs == [int(name) for name in everything.names] and found.names == IDS
    assert any("p.pth does not name its classes: ImageNet's order" in note for note in found.notes)


def test_numbers_that_the_model_was_trained_on_are_names():
    trained = Classes(4, ["10", "2", "1", "0"])
    found = match("auto", "p.pth", trained, NUMBERS)
    assert (found.kind, found.outputs, found.notes) == ("classes", [3, 2, 0, 1], [])


@pytest.mark.parametrize("kind", ["imagenet-a", "imagenet-r"])
def test_200_classes_compete_alone(kind):
    ids = ids_of(kind.replace("-", "_"))
    for model in (Classes(1000), Classes(1000, IDS[::-1])):
        found = match("auto", "p.pth", model, Classes(200, ids))
        assert (found.kind, found.restricted, found.names) == (kind, True, ids)
        order = model.names or IDS
        assert [order[output] for output in found.outputs] == ids
        assert found.notes[-1] == f"{kind}: only its 200 classes compete, as is usual; 800 outputs are left out"
    found = match("auto", "p.pth", Classes(1000), Classes(199, ids[1:]))
    assert (found.kind, found.restricted, len(found.names)) == ("classes", False, 1000), "--kind says it"


def test_names_of_outputs_that_nobody_knows():
    assert match("auto", "p.pth", Classes(3), Classes(3)).names == ["output 0", "output 1", "output 2"]
    assert match("auto", "p.pth", Classes(2), Classes(2, ["cat", "dog"])).names == ["cat", "dog"]
    assert match("auto", "p.pth", Classes(3, ["dog", "cat"]), Classes(1, ["cat"])).names == ["dog", "cat", "output 2"]


def test_what_does_not_match():
    with pytest.raises(DataError, match="has a class 1000: ImageNet-V2's folders are called 0 to 999"):
        match("auto", "p.pth", SOME, Classes(2, ["1", "1000"]))
    with pytest.raises(DataError, match="the data does not name its classes: ImageNet-V2's"):
        match("imagenet-v2", "p.pth", SOME, Classes(1000))
    with pytest.raises(CheckpointError, match="n01491361 are not among its"):
        match("auto", "p.pth", SOME, Classes(2, ["0", "3"]))


def folders(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).mkdir(parents=True)
    return root


def test_where_the_images_are(tmp_path, monkeypatch):
    assert find_parts(folders(tmp_path / "a", "train/cat", "val/cat"), "auto") == [Part(tmp_path / "a" / "val")]
    assert find_parts(folders(tmp_path / "v2", "0", "1", "10", "2"), "auto") == [Part(tmp_path / "v2")]
    (folders(tmp_path, "b") / "b" / "val.beton").write_bytes(b"")
    assert find_parts(tmp_path / "b", "auto") == find_parts(tmp_path / "b" / "val.beton", "auto")
    monkeypatch.chdir(tmp_path / "v2")
    assert find_parts(Path("."), "auto") == [Part(tmp_path / "v2")]
    (tmp_path / "b" / "val-00000-of-00002.beton").write_bytes(b"")
    with pytest.raises(
        DataError, match=f"val-00000-of-00002.beton is a part of the data: name the folder {tmp_path}/b"
    ):
        find_parts(tmp_path / "b" / "val-00000-of-00002.beton", "auto")
    with pytest.raises(DataError, match="no folder"):
        find_parts(tmp_path / "none", "auto")


def test_the_folders_of_imagenet_c(tmp_path):
    fog = [Part(tmp_path / "c" / "fog" / "2", "fog", 2), Part(tmp_path / "c" / "fog" / "5", "fog", 5)]
    snow = Part(tmp_path / "c" / "snow" / "1", "snow", 1)
    data = folders(tmp_path / "c", "snow/1/n01440764", "fog/5/n01440764", "fog/2/n01440764")
    assert find_parts(data, "auto") == find_parts(data, "imagenet-c") == [*fog, snow]
    assert find_parts(data / "fog", "auto") == fog
    assert find_parts(data, "classes") == [Part(data)]
    data = folders(tmp_path / "d", "weather/fog/3/n01440764", "blur/zoom_blur/1/n01440764")  # as the archives are named
    assert [part[1:] for part in find_parts(data, "auto")] == [("fog", 3), ("zoom_blur", 1)]
    with pytest.raises(DataError, match="holds fog twice"):
        find_parts(folders(data, "more/fog/1/n01440764"), "auto")
    with pytest.raises(DataError, match="is not ImageNet-C: it must look like"):
        find_parts(folders(tmp_path / "e", "val/cat"), "imagenet-c")


def test_labels_by_the_names_of_files(tmp_path):
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[], [3, 5], [7]]))
    names = [f"/val/n01440764/ILSVRC2012_val_0000000{number}.JPEG" for number in (3, 1, 2)]
    real, outputs = read_real(file), {3: 30, 7: 70}
    assert labels_of(names, real, outputs) == [[70], [], [30, figures.NO_OUTPUT]]
    with pytest.raises(DataError, match="image 5 of val.beton is not called ILSVRC2012_val_NUMBER"):
        labels_of(["image 5 of val.beton"], real, outputs)
    with pytest.raises(DataError, match="labels of 3 images, none of ILSVRC2012_val_00000004"):
        labels_of(["ILSVRC2012_val_00000004.JPEG"], real, outputs)
    for text in ("[[1000]]", "[1]", "{}", '[["n01440764"]]'):
        file.write_text(text)
        with pytest.raises(DataError, match="must be a list with a list of labels in"):
            read_real(file)
    file.write_text("[[1")
    with pytest.raises(DataError, match="does not read .*: download real.json again"):
        read_real(file)
