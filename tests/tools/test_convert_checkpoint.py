"""`tools.convert_checkpoint`: every form holds the same bits, and says what it leaves out."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import dcd
from tests.dcd.test_golden import GOLDEN, golden_input
from tests.helpers import difference
from tools.checkpoint_options import SAYS_ALL, CheckpointOptions
from tools.convert_checkpoint import main
from training.checkpoint import of_the_best, write_file
from training.config import Config

ROOT = Path(__file__).parents[2]
OFFICIAL = GOLDEN / "mobilenetv2_dcd_w0.1_c10.pth.tar"
NAMES = ["ant", "bee", "cat"]
FORMS = {"own": "x.pth", "official": "x.pth.tar", "timm": "x_timm.pth", "safetensors": "x.safetensors"}


def randomised(arch: str, seed: int, num_classes: int = 3, **sizes) -> dict[str, torch.Tensor]:
    """Weights whose values are all different, negative zero and subnormal numbers among them."""
    torch.manual_seed(seed)
    state = dcd.create_model(arch, num_classes, **sizes).state_dict()
    for name, tensor in state.items():
        tensor.copy_(torch.rand(tensor.shape) + 0.5 if tensor.is_floating_point() else torch.tensor(seed))
        if name.endswith("bn1.bias"):
            tensor[:2] = torch.tensor([-0.0, 1e-41])
    return state


def best(path: Path, arch: str = "mobilenetv2_dcd", dropout: float | None = None, ema: bool = True, **sizes) -> Path:
    """A file as a run writes it, whose best evaluation was of the moving average if it keeps one."""
    sizes = sizes or ({"width_mult": 0.1, "fc_squeeze": 16} if arch == "mobilenetv2_dcd" else {})
    config = Config().with_options(arch=arch, num_classes=3, dropout=dropout, eval_size=48, eval_crop=0.8, **sizes)
    content = {
        "best": "ema" if ema else "model",
        "architecture": config.model.architecture,
        "classes": NAMES,
        "preprocessing": config.preprocessing.to_dict(),
        "config": config.to_dict(),
        "best_epoch": 4,
        "best_top1": 75.5,
        "model": randomised(arch, 1, **sizes),
        "ema": randomised(arch, 2, **sizes) if ema else None,
    }
    write_file(of_the_best(content, content["best"]), path)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """`best` of a small dynamic network, in the output folder of its run."""
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    folder.mkdir()
    return best(folder / "best.pth")


@pytest.fixture
def convert(capsys):
    """`main`: what it prints; the last line is the error where it ends with one."""

    def call(source: Path, target: Path, **options) -> str:
        network = CheckpointOptions(**{name: options.pop(name) for name in vars(SAYS_ALL) if name in options})
        try:
            main(source, target, network=network, **options)
        except SystemExit as error:
            return f"{capsys.readouterr().out}{error.code}"
        return capsys.readouterr().out

    return call


def stored(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


def same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    """Also of zeros with a sign."""
    if found.keys() != expected.keys():
        return False
    pairs = [(found[name], expected[name]) for name in expected]
    return all(
        one.dtype == other.dtype and torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        for one, other in pairs
    )


# A walk through every ordered pair of two forms
WALK = ["own", "official", "own", "timm", "own", "safetensors", "official"]
WALK += ["timm", "official", "safetensors", "timm", "safetensors", "own"]


@pytest.mark.parametrize(("walk", "dropout"), [(WALK, 0.2), (WALK[:3], None)])
def test_there_and_back_through_every_pair(convert, tmp_path, walk, dropout):
    source = best(tmp_path / "best.pth", dropout=dropout)
    original = torch.load(source, weights_only=True)
    names = dcd.upstream_names(dcd.create_model("mobilenetv2_dcd", 3, dropout, width_mult=0.1, fc_squeeze=16))
    place = 0 if dropout is None else 1
    assert names["classifier.static_linear.weight"] == f"classifier.{place}.cls.weight"
    checked, one = set(), source
    for step, form in enumerate(walk):
        other = tmp_path / f"{step}_{FORMS[form]}"
        assert "error" not in convert(one, other, to=form, force=True)  # over the card of the last one
        expected = {names[name] if form == "official" else name: value for name, value in original["ema"].items()}
        assert same_bits(dcd.read_weights(other).state, expected), other
        if form not in checked:
            model = dcd.load(other)
            assert same_bits(model.state_dict(), original["ema"])
            assert model.architecture == original["architecture"] and model.class_names == NAMES
            assert model.preprocessing.to_dict() == original["preprocessing"]
        checked.add(form)
        one = other
    last = torch.load(one, weights_only=True)
    assert (last["best_top1"], last["best_epoch"], last["origin"]) == (75.5, 4, "run")


def test_the_weights_beside_the_average_and_what_is_left_out(convert, source, tmp_path):
    said = convert(source, tmp_path / "average.pth")
    assert said.splitlines() == [
        "left out: model; --ema no takes the weights that are no average",
        f"wrote {tmp_path / 'average.pth'}",
    ]
    said = convert(source, tmp_path / "plain.safetensors", to="safetensors", ema="no")
    assert said.startswith("left out: config, best_epoch, best_top1, ema; --ema yes takes the moving average\n")
    model = torch.load(source, weights_only=True)["model"]
    assert same_bits(dcd.load(tmp_path / "plain.safetensors").state_dict(), model)
    assert "top-1" not in (tmp_path / "README.md").read_text(), "it was of the average"
    assert "holds no moving average" in convert(tmp_path / "average.pth", tmp_path / "other.pth", ema="yes")


def test_an_official_checkpoint_stays_official(convert, tmp_path):
    """Through all forms, with its names and its terms."""
    files = [OFFICIAL, *(tmp_path / name for name in ("a.pth", "b.safetensors", "c.pth", "d.pth.tar"))]
    sizes = {"width_mult": 0.1, "fc_squeeze": 16}
    said = convert(OFFICIAL, files[1], **sizes)
    assert "left out: epoch, best_prec1, optimizer" in said
    for (one, other), form in zip(itertools.pairwise(files[1:]), ("safetensors", "timm", "official"), strict=True):
        assert "error" not in convert(one, other, to=form)
    theirs, ours = (torch.load(file, weights_only=True)["state_dict"] for file in (OFFICIAL, files[-1]))
    assert difference(ours, {name.removeprefix("module."): tensor for name, tensor in theirs.items()}) == []
    assert files[-1].read_bytes()[:2] == b"\x80\x02", "PyTorch 1.0 reads no zip file"
    card = (tmp_path / "README.md").read_text()
    assert "license: other" in card and "education, research and non-profit purposes only" in card
    with torch.no_grad():
        logits = dcd.load(files[2])(golden_input(2).float()).numpy()
    expected = np.load(f"{OFFICIAL}.npz")["logits"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("arch", "sizes", "name"),
    [
        ("resnet18", {}, "resnet18"),
        ("mobilenetv2", {"width_mult": 1.0}, "mobilenetv2_100"),
    ],
)
def test_static_networks_are_those_of_timm_and_of_torchvision(convert, tmp_path, arch, sizes, name):
    import timm

    source = best(tmp_path / "best.pth", arch, ema=False, **sizes)
    assert "error" not in convert(source, tmp_path / "timm.pth", to="timm")
    content = torch.load(tmp_path / "timm.pth", weights_only=True)
    assert content["arch"] == name
    theirs = timm.create_model(name, num_classes=3).eval()
    theirs.load_state_dict(content["state_dict"])
    model, images = dcd.load(source), torch.rand(2, 3, 48, 48)
    torch.testing.assert_close(theirs(images), model(images))

    assert "the names are torchvision's" in convert(source, tmp_path / "x.pth.tar", to="official")
    create = torchvision.models.resnet18 if arch == "resnet18" else torchvision.models.mobilenet_v2
    theirs = create(num_classes=3, **sizes).eval()
    theirs.load_state_dict(torch.load(tmp_path / "x.pth.tar", weights_only=True)["state_dict"])
    torch.testing.assert_close(theirs(images), model(images))

    torch.save(content["state_dict"], tmp_path / "bare.pth")  # as others write it, who do not say what it is
    assert "error" not in convert(tmp_path / "bare.pth", tmp_path / "back.pth", arch=arch, **sizes)
    assert same_bits(dcd.load(tmp_path / "back.pth").state_dict(), model.state_dict())


def test_what_another_form_does_not_have(convert, tmp_path):
    rival = best(tmp_path / "rival.pth", "resnet18_se", ema=False)
    assert convert(rival, tmp_path / "x.pth", to="official") == (
        "error: the official release has no resnet18_se: use --to own or safetensors"
    )
    assert "timm itself has no resnet18_se: the names are our own" in convert(rival, tmp_path / "x.pth", to="timm")
    narrow = best(tmp_path / "narrow.pth", "mobilenetv2", ema=False, width_mult=0.25)
    assert "mobilenetv2 of width_mult 0.35, 0.5, 0.75, 1.0, 1.4, not 0.25" in convert(
        narrow, tmp_path / "y.pth", to="timm"
    )
    assert not (tmp_path / "y.pth").exists()


def test_types_are_kept_and_missing_counters_are_said(convert, tmp_path):
    state = randomised("mobilenetv2_dcd", 1, width_mult=0.1, fc_squeeze=16)
    state = {name: tensor.half() for name, tensor in state.items() if tensor.is_floating_point()}
    torch.save(state, tmp_path / "half.pth")
    sizes = {"arch": "mobilenetv2_dcd", "width_mult": 0.1, "fc_squeeze": 16}
    said = convert(tmp_path / "half.pth", tmp_path / "half.safetensors", to="safetensors", **sizes)
    assert "counters of batches" in said and "are 0" in said
    found, _ = stored(tmp_path / "half.safetensors")
    assert same_bits({name: found[name] for name in state}, state)
    said = convert(tmp_path / "half.safetensors", tmp_path / "x.pth.tar", to="official")
    assert "whether there was a dropout is not known" in said


def test_nothing_is_overwritten_unasked(convert, source, tmp_path):
    target, card = tmp_path / "x.safetensors", tmp_path / "README.md"
    card.write_text("mine")
    said = convert(source, target, to="safetensors")
    assert said == f"error: {card} is there already: name another one, or --force" and not target.exists()
    assert "error" not in convert(source, target, to="safetensors", force=True) and card.read_text() != "mine"
    before = source.read_bytes()
    assert f"error: {source} is what is converted" in convert(source, source, force=True)
    assert "a file of safetensors, and no other, is named" in convert(source, tmp_path / "x.pth", to="safetensors")
    assert f"error: {tmp_path} is a folder" in convert(source, tmp_path)
    assert "make it first" in convert(source, tmp_path / "nowhere" / "x.pth")
    assert source.read_bytes() == before and sorted(tmp_path.iterdir()) == sorted([target, card])


def test_a_full_disk_loses_nothing(convert, source, small_disk):
    disk = small_disk("64k")
    (disk / "x.pth").write_text("older")
    assert "error: [Errno 28]" in convert(source, disk / "x.pth", force=True)
    assert [(path.name, path.read_text()) for path in disk.iterdir()] == [("x.pth", "older")]


def test_a_run_by_its_command_with_metadata_and_card(source, tmp_path):
    target, run = tmp_path / "model.safetensors", source.parents[1]
    command = ["tools.convert_checkpoint", run, target, "--to", "safetensors"]
    done = subprocess.run([sys.executable, "-m", *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"wrote {target} and {tmp_path / 'README.md'}"
    state, metadata = stored(target)
    original, about = torch.load(source, weights_only=True), json.loads(metadata["dcd"])
    assert same_bits(state, original["ema"]) and metadata["format"] == "pt"
    for key in ("architecture", "classes", "preprocessing", "best_top1", "best_epoch"):
        assert about[key] == original[key], key
    card = (tmp_path / "README.md").read_text()
    count = sum(parameter.numel() for parameter in dcd.load(target).parameters())
    for part in (
        "---\n# license: fill in",
        "`mobilenetv2_dcd`, width_mult 0.1, fc_squeeze 16",
        f"| parameters | {count:,} |",
        "0.8 of the shorter side, resized to 48 × 48",
        "75.50 % in the evaluation of its run after epoch 5",
        'model = dcd.load("model.safetensors")',
        "trained by dcd-trainer from scratch",
    ):
        assert part in card, part
