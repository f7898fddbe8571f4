"""`--config`: its forms, who overrides whom, an earlier run's config.json, and one line for what is wrong."""

import json
import sys
from pathlib import Path

import pytest

from tests.helpers import SMALL, read, run
from training.config import Config, parse_config
from training.options import ConfigError
from training.recipes import RECIPES


@pytest.fixture
def parse(tmp_path):
    """The options of a command line beside a file, here with a text or, as JSON, a dict in it."""

    def call(content: str | dict, line: str = "", name: str = "run.yaml") -> Config:
        path = tmp_path / (name if isinstance(content, str) else "run.json")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return parse_config([*line.split(), "--config", str(path)], RECIPES, Config())

    return call


FLAT = """
arch: mobilenetv2_dcd   # a comment
data: ~/imagenet
batch-size: 64
input_size: 96
weight-decay: 1e-5
amp: off
schedule: [5, 8]
size_ramp: 1 2
dropout: null
warmup: yes
norm-decay: false
"""
GROUPED = """
model: {arch: mobilenetv2_dcd, dropout: ~}
data:
  data: ~/imagenet
  batch_size: 64
  input-size: 96
  size_ramp: [1, 2]
optimisation: {wd: 0.00001, schedule: [5, 8], warmup: true, norm_decay: no}
precision: {amp: "off"}
"""
IN_JSON = {
    "arch": "mobilenetv2_dcd",
    "data": {"data": "~/imagenet", "batch_size": 64, "input_size": 96, "size_ramp": [1, 2]},
    "optim": {"wd": 1e-5, "schedule": [5, 8], "warmup": True, "norm_decay": False},
    "amp": "off",
    "dropout": None,
}


@pytest.mark.parametrize(
    "content", [FLAT, GROUPED, IN_JSON, json.dumps(IN_JSON)], ids=["flat", "grouped", "json", "1.2"]
)
def test_every_form_says_the_same(parse, content):
    found = parse(content).to_dict()
    found.pop("config")
    expected = Config().with_options(
        arch="mobilenetv2_dcd", data=Path.home() / "imagenet", batch_size=64, input_size=96, wd=1e-5, amp="off",
        schedule=(5, 8), size_ramp=(1, 2), warmup=True, norm_decay=False,
    )  # fmt: skip
    assert found == {name: value for name, value in expected.to_dict().items() if name != "config"}


def test_a_file_overrides_a_recipe_and_flags_override_the_file(parse):
    config = parse("epochs: 60\nlr: 0.3\nnesterov: true\n", "--recipe resnet50_dcd --lr 0.2 --no-nesterov")
    assert (config.optim.epochs, config.optim.lr, config.optim.nesterov) == (60, 0.2, False)
    assert config.optim.mixup == 0.2 and config.run.recipe == "resnet50_dcd"
    by_file = parse("recipe: mobilenetv2_dcd\nepochs: 60\n")
    assert by_file.optim.epochs == 60 and by_file.model.fc_squeeze == 16 and by_file.run.recipe == "mobilenetv2_dcd"
    assert parse("recipe: mobilenetv2_dcd\n", "--recipe resnet50_dcd").model.arch == "resnet50_dcd"
    assert parse("schedule: [10, 20]\n", "--schedule 5").optim.schedule == (5,)
    assert parse("freeze: true\n", "--weight x.pth").optim.freeze, "what they say together counts"
    assert parse("# nothing\n").to_dict() == Config().with_options(config=parse("").run.config).to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("epoch: 3", "epoch: there is no such option; did you mean epochs?"),
        ("optim: {batch_sise: 3}", "batch_sise: there is no such option; did you mean batch-size?"),
        ("optimm: {lr: 3}", "optimm: there is no such group; did you mean optim?"),
        ("model: {lr: 3}", "lr: does not belong to model, but to optim"),
        ("zzz: 3", "zzz: there is no such option"),
        ("epochs: many", "--epochs: invalid literal for int"),
        ("epochs: 1.5", "--epochs: invalid literal for int"),
        ("epochs: [1, 2]", "epochs: must be one value, not a list"),
        ("epochs: 0", "--epochs 0: must be at least 1"),
        ("epochs: null", "epochs: needs a value"),
        ("schedule: [[1]]", "schedule: must be one value, or a list of values"),
        ("schedule: [--evaluate]", "schedule: must be one value, or a list of values"),
        ("size_ramp: [1]", "--size-ramp: needs a value"),
        ("warmup: 3", "warmup: must be true or false, not 3"),
        ("amp: int8", "--amp.*'auto', 'bf16', 'fp16', 'off'"),
        ("epochs: 3\nepochs: 4", "epochs: is there twice"),
        ("batch-size: 3\nbatch_size: 4", "batch_size: is there twice"),
        ("wd: 3\nweight_decay: 4", "wd: is there twice"),
        ("config: other.yaml", "config: a file can't name another"),
        ("- epochs", "must hold options by their names"),
        ("epochs: [3", "is no YAML: "),
        ("? [a]\n: 3", r"\[.*\]: a key must be a name"),
        (
            {"config": {"epochs": 3, "mixxup": 1}, "versions": {}},
            "mixxup: there is no such option; did you mean mixup?",
        ),
        ({"epochs": True}, "--epochs: invalid literal for int"),
    ],
)
def test_one_line_with_the_file_and_the_key(parse, content, message):
    with pytest.raises(ConfigError, match=rf"^--config \S+/run\.(yaml|json): {message}") as error:
        parse(content)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read(parse, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="run.json: is no JSON"):
        parse("{", name="run.json")
    with pytest.raises(ConfigError, match="nothing.yaml: can't be read: No such file"):
        parse_config(["--config", str(tmp_path / "nothing.yaml")], RECIPES, Config())
    with pytest.raises(ConfigError, match="unknown recipe 'x'"):
        parse("recipe: x\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ConfigError, match="pip install pyyaml, or name a .json file"):
        parse("epochs: 3\n")
    assert parse({"epochs": 3}).optim.epochs == 3


def test_a_bad_flag_is_not_laid_on_the_file(parse):
    with pytest.raises(ConfigError, match="^--lr nan"):
        parse("epochs: 3\n", "--lr nan")


def test_an_earlier_run_is_repeated_elsewhere(parse, capsys):
    once = {"checkpoint": Path("runs/a"), "resume": Path("x.pth"), "stop_after_steps": 3, "profile": 5}
    kept = {"epochs": 7, "lr": 0.07, "seed": 3, "crop_ratio": (0.7, 1.4), "ema": 0.9, "recipe": "mobilenetv2_dcd"}
    earlier = {"config": Config().with_options(**once, **kept).to_dict(), "versions": {"torch": "2.11"}}
    found = parse(earlier, "--profile 9").to_dict()
    assert found == Config().with_options(**kept, profile=9, config=found["config"]).to_dict()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("not taken over: --checkpoint runs/a, --resume x.pth, --stop-after-steps 3")

    del earlier["config"]["crop_ratio"], earlier["config"]["ema"]
    older = parse(earlier, "-c runs/b --resume=y.pth --stop-after-steps 4")
    assert older.model.fc_squeeze == 8, "the options are there already: they override the recipe that they began from"
    assert older.augmentation.crop_ratio == (3 / 4, 4 / 3) and older.optim.ema is None
    assert "--checkpoint" not in capsys.readouterr().out


def test_an_earlier_runs_classes_are_those_of_its_data(parse, capsys):
    earlier = {"config": Config().with_options(data=Path("a"), num_classes=7).to_dict()}
    assert parse(earlier).model.num_classes == 7 and not capsys.readouterr().out
    assert parse(earlier, "-d b").model.num_classes is None
    assert "not taken over: --num-classes 7\n" in capsys.readouterr().out
    assert parse(earlier, "-d b --num-classes=9").model.num_classes == 9 and not capsys.readouterr().out


def test_a_real_run_is_repeated(tmp_path, tiny):
    run(*SMALL, "-d", tiny, "-b", 12, "--epochs", 1, "-c", tmp_path / "a")
    output = run("--config", tmp_path / "a" / "config.json", "-c", tmp_path / "b", ranks=2)
    assert "not taken over" not in output
    first, second = (read(tmp_path / name, "config.json")["config"] for name in ("a", "b"))
    changed = {name: value for name, value in second.items() if value != first[name]}
    assert changed == {"checkpoint": str(tmp_path / "b"), "config": str(tmp_path / "a" / "config.json")}
