"""`tools.evaluate` as its users run it, against plain computations with the same model and images."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import dcd
from pipelines.build import build_loader
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.sources.errors import DataError
from tests.betons import Beton
from tests.helpers import SMALL, read, run
from tests.tools.test_evaluation import IDS, plain_calibration
from tools.checkpoint_options import SAYS_ALL, CheckpointOptions
from tools.evaluate import Options, main
from training.build import errors_in_one_line
from training.command_line import parse
from training.config import Config
from training.options import ConfigError

POSITIONS = (2, 10, 1)  # of the classes of the data among ImageNet's
KNOWN = [IDS[position] for position in (10, 2, 999, 1, 0)]  # the classes of the model, in an order of its own
SHAPE = {"arch": "mobilenetv2_dcd", "num_classes": 5, "width_mult": 0.1, "fc_squeeze": 16}


def new_model(classes: int = 5) -> torch.nn.Module:
    """Sure of some answers, and not always of the same."""
    torch.manual_seed(0)
    model = dcd.create_model("mobilenetv2_dcd", classes, width_mult=0.1, fc_squeeze=16).eval()
    model.classifier.static_linear.weight.data.mul_(3e4)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """As a run of ours writes it."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.pth"
    options = Config().with_options(**SHAPE, input_size=32, eval_crop=1.0, ema=0.9).to_dict()
    state = new_model().state_dict()
    average = {f"module.{name}": values + 0.01 * (values.is_floating_point()) for name, values in state.items()}
    content = {"model": state, "ema": average, "classes": KNOWN, "architecture": SHAPE, "config": options}
    torch.save(content, path)
    return path


@pytest.fixture(scope="module")
def val(tiny, tmp_path_factory) -> Path:
    """23 images of three of ImageNet's classes, called as ImageNet's: in DATA/val."""
    root, number = tmp_path_factory.mktemp("imagenet"), 23
    for folder, position in zip(sorted((tiny / "val").iterdir()), POSITIONS, strict=True):
        (root / "val" / IDS[position]).mkdir(parents=True)
        for image in sorted(folder.iterdir()):
            shutil.copy(image, root / "val" / IDS[position] / f"ILSVRC2012_val_{number:08d}{image.suffix}")
            number -= 1
    return root


def renamed(val: Path, out: Path, name) -> Path:
    """The same images, in folders called by `name(position)`."""
    for position in POSITIONS:
        shutil.copytree(val / "val" / IDS[position], out / name(position))
    return out


@pytest.fixture(scope="module")
def expected(val) -> tuple[torch.Tensor, list[str]]:
    """The logits (23, 5) of the model for all images, and their classes, in the order of the folder."""
    config = DataConfig(val, "torchvision", batch_size=23, workers=0, eval_size=32)
    loader = build_loader(config, "val", augmentation=AugmentationConfig(eval_crop=1.0))
    images, labels, _ = next(iter(loader))
    with torch.no_grad():
        return new_model()(images), [loader.class_names[label] for label in labels]


def evaluate(checkpoint: Path, data: Path, out: Path, **options) -> dict:
    """What the program writes, run in this process."""
    network = CheckpointOptions(**{name: options.pop(name) for name in vars(SAYS_ALL) if name in options})
    main(Options(checkpoint, data, network, json=out, batch_size=8, workers=1, amp="off", device="cpu", **options))
    return json.loads(out.read_text())


def write_real(folder: Path, labels: list[list[int]]) -> Path:
    (folder / "real.json").write_text(json.dumps(labels))
    return folder / "real.json"


def check(found: dict, logits: torch.Tensor, labels: list[int]) -> None:
    """All figures, by plain computations image by image."""
    truth = torch.tensor(labels)
    top = logits.argsort(1, descending=True)[:, :5].tolist()
    confidences, count = logits.softmax(1).amax(1).tolist(), len(labels)
    right = [label == best[0] for label, best in zip(labels, top, strict=True)]
    assert found["images"] == count and found["not_finite"] == 0
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, truth).item(), rel=1e-4)
    assert found["top1"] == pytest.approx(100 * sum(right) / count)
    hits = [label in best for label, best in zip(labels, top, strict=True)]
    assert found["top5"] == pytest.approx(100 * sum(hits) / count)
    assert found["calibration"]["ece"] == pytest.approx(
        plain_calibration(list(zip(confidences, right, strict=True))), rel=1e-3
    )
    confusion: dict[tuple[int, int], int] = {}
    for label, best in zip(labels, top, strict=True):
        confusion[label, best[0]] = confusion.get((label, best[0]), 0) + 1
    assert {tuple(row[:2]): row[2] for row in found["confusion"]} == confusion
    for row in found["classes"]:
        label = found["names"].index(row["class"])
        of_class = [hit for hit, each in zip(right, labels, strict=True) if each == label]
        assert (row["images"], row["top1"]) == (len(of_class), pytest.approx(100 * sum(of_class) / len(of_class)))


def test_imagenet_and_its_reassessed_labels_on_one_rank_and_on_two(val, checkpoint, expected, tmp_path, capsys):
    logits, names = expected
    several = [[], [10], [10, 2, 500]]
    labels = {f"ILSVRC2012_val_{number:08d}": several[number % 3] for number in range(1, 31)}  # more than images
    real = write_real(tmp_path, list(labels.values()))
    found = evaluate(checkpoint, val, tmp_path / "one.json", real=real)
    check(found, logits, [KNOWN.index(name) for name in names])
    assert found["names"] == KNOWN and found["kind"] == "classes"
    assert found["words"][IDS[1]] == "goldfish, Carassius auratus"
    files = sorted((val / "val").glob("*/*"), key=lambda path: (path.parent.name, path.name))
    pairs = [(labels[file.stem], IDS.index(KNOWN[row.argmax()])) for file, row in zip(files, logits, strict=True)]
    right = [best in each for each, best in pairs if each]
    assert found["real"]["images"] == len(right) == 16 and found["real"]["without_labels"] == 7
    assert found["real"]["top1"] == pytest.approx(100 * sum(right) / 16) and 0 < sum(right) < 16
    output = capsys.readouterr().out
    assert f"evaluating on 3 of the 5 classes of {checkpoint}" in output
    assert (
        "between which --ema chooses: the weights" in output and "| ReaL (7 without labels left out) | 16 |" in output
    )
    assert "| worst classes | images | top-1 % | most often taken for |" in output
    assert "goldfish" in output

    args = ["-b", 8, "-j", 2, "--amp", "off", "--device", "cpu", "--real", real, "--json", tmp_path / "two.json"]
    output = run(checkpoint, val, *args, ranks=2, module="tools.evaluate")
    assert output.count("| worst classes |") == 1, "rank 0 speaks"
    both = json.loads((tmp_path / "two.json").read_text())
    assert (found["world_size"], both["world_size"]) == (1, 2)
    for key in ("images", "top1", "top5", "classes", "confusion", "names"):
        assert both[key] == found[key], key
    assert both["loss"] == pytest.approx(found["loss"])
    for a, b in ((both, found), (both["real"], found["real"])):
        assert a["calibration"]["ece"] == pytest.approx(b["calibration"]["ece"], rel=1e-4)
        assert a["top1"] == b["top1"]


def test_a_training_evaluates_to_the_same(val, checkpoint, main, tmp_path):
    """By --evaluate of train_dist.py."""
    found = evaluate(checkpoint, val / "val", tmp_path / "found.json")
    options = [*SMALL, "--eval-crop", 1, "--device", "cpu", "-b", 8]
    main(*options, "-d", val, "-c", tmp_path, "--weight", checkpoint, "--evaluate")
    result = read(tmp_path, "evaluation.json")["result"]
    assert result.pop("loss") == pytest.approx(found["loss"]) and {key: found[key] for key in result} == result


def test_a_beton_file_that_names_no_classes(tmp_path, capsys):
    path, data = tmp_path / "weights.pth", Beton().write(tmp_path / "val.beton")
    torch.save({"model": new_model(3).state_dict()}, path)
    options = {"arch": "mobilenetv2_dcd", "width_mult": 0.1, "fc_squeeze": 16, "eval_size": 32}
    for each in (data, tmp_path):
        found = evaluate(path, each, tmp_path / "found.json", **options)
        assert found["images"] == 3 and found["names"] == ["output 0", "output 1", "output 2"]
    assert f"{path} does not name its classes: their order is assumed to be that of the data" in capsys.readouterr().out
    with pytest.raises(DataError, match="image 0 of .* is not called ILSVRC2012_val_NUMBER"):
        evaluate(path, data, tmp_path / "found.json", real=write_real(tmp_path, [[]]), **options)


def test_numbered_folders_are_imagenet_v2(val, checkpoint, expected, tmp_path, capsys):
    """Folders sort as 1, 10, 2: by position the labels would be wrong."""
    logits, names = expected
    data = renamed(val, tmp_path / "v2", str)
    found = evaluate(checkpoint, data, tmp_path / "found.json")
    order = sorted(range(23), key=lambda index: str(IDS.index(names[index])))
    check(found, logits[order], [KNOWN.index(names[index]) for index in order])
    assert found["kind"] == "imagenet-v2"
    assert "classes are numbers, positions among ImageNet's sorted WordNet IDs" in capsys.readouterr().out


def test_only_the_classes_of_imagenet_a_compete(val, checkpoint, expected, tmp_path, capsys):
    logits, names = expected
    found = evaluate(checkpoint, val, tmp_path / "found.json", kind="imagenet-a")
    assert found["names"] == sorted(IDS[position] for position in POSITIONS)
    order = sorted(range(23), key=lambda index: names[index])
    of_these = [KNOWN.index(name) for name in found["names"]]
    check(found, logits[order][:, of_these], [found["names"].index(names[index]) for index in order])
    assert "imagenet-a: only its 3 classes compete, as is usual; 2 outputs are left out" in capsys.readouterr().out


def test_a_checkpoint_without_names_or_options(val, tmp_path, capsys):
    path = tmp_path / "official.pth.tar"
    torch.save({"state_dict": new_model(1000).state_dict()}, path)
    with pytest.raises(ConfigError, match="official.pth.tar does not say which model it is of: name it, as by -a"):
        main(Options(path, val))
    options = {"arch": "mobilenetv2_dcd", "width_mult": 0.1, "fc_squeeze": 16, "eval_size": 32, "rows": 0}
    found = evaluate(path, val, tmp_path / "found.json", **options)
    assert found["names"] == IDS
    labels = {row[0] for row in found["confusion"]}
    assert labels == set(POSITIONS)
    output = capsys.readouterr().out
    assert f"{path} does not name its classes: ImageNet's order, of sorted WordNet IDs, is assumed" in output
    assert "evaluating on 3 of the 1000 classes" in output and "32 pixels of 87.5 %" in output
    assert "worst classes" not in output


def test_imagenet_c(val, checkpoint, tmp_path, capsys):
    for corruption, severities in (("fog", "12"), ("spatter", "3")):
        for severity in severities:
            renamed(val, tmp_path / "c" / corruption / severity, IDS.__getitem__)
    shutil.rmtree(tmp_path / "c" / "fog" / "2" / IDS[10])
    found = evaluate(checkpoint, tmp_path / "c", tmp_path / "found.json", ema="yes")
    assert found["kind"] == "imagenet-c" and found["config"]["eval_crop"] == 1
    fog = found["corruptions"]["fog"]
    assert (fog["1"]["images"], fog["2"]["images"]) == (23, 15)
    assert found["errors"]["error"]["fog"] == pytest.approx(100 - (fog["1"]["top1"] + fog["2"]["top1"]) / 2)
    assert found["errors"]["extra"] == ["spatter"] and found["errors"]["mce"] is None
    output = capsys.readouterr().out
    assert "no mCE, since these are missing: gaussian_noise" in output and "and 12 more" in output
    assert "the parts have 15 to 23 images: is one of them incomplete?" in output
    assert "not counted in the means, since ImageNet-C's 15 do not have them: spatter" in output
    assert "between which --ema chooses: the moving average" in output


def test_images_are_not_cut_again_on_imagenet_c(val, expected, tmp_path):
    """The checkpoint says 7/8, which is for whole images."""
    logits, names = expected
    options = Config().with_options(**SHAPE, input_size=32).to_dict()
    path = tmp_path / "best.pth"
    torch.save({"model": new_model().state_dict(), "classes": KNOWN, "architecture": SHAPE, "config": options}, path)
    renamed(val, tmp_path / "c" / "fog" / "1", IDS.__getitem__)
    found = evaluate(path, tmp_path / "c", tmp_path / "found.json")["corruptions"]["fog"]["1"]
    labels = torch.tensor([KNOWN.index(name) for name in names])
    assert found["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert evaluate(path, val, tmp_path / "found.json")["loss"] != pytest.approx(found["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--json", "/nowhere/found.json"], "--json /nowhere/found.json: must be a file in a folder that exists"),
        (["--rows", "-1"], "--rows -1: must be at least 0"),
        (["--kind", "imagenet"], "--kind imagenet: must be one of 'auto', 'classes', 'imagenet-v2'"),
        (["--real", "/nowhere.json"], "--real /nowhere.json does not read"),
        (["--kind", "imagenet-c"], "is not ImageNet-C: it must look like"),
        (["-b", "0"], "--batch-size 0: must be at least 1"),
        (["-a", "resnet18"], "--width-mult has no meaning for resnet18"),
        (["--eval-crop", "2"], "the share of the centre crop must lie in"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(val, checkpoint, args, message, capsys):
    with pytest.raises(SystemExit) as ended, errors_in_one_line():
        main(parse(Options, args=[str(checkpoint), str(val), "--device", "cpu", *args]))
    output = capsys.readouterr().err if ended.value.code == 2 else ended.value.code
    assert message in output and output.strip().count("\n") == 0
