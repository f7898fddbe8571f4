"""What a run writes beside its own metrics: TensorBoard's events, and copies for services, of which stand-ins tell."""

import io
import json
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import SMALL, build_trainer, error_lines, lines, read
from training import services
from training.run_log import RunLog


def events(folder: Path):
    """All that TensorBoard finds in a run's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "scalars": 0}).Reload()


def session(found) -> dict:
    """The hyperparameters that the HParams tab has of a run."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    return HParamsPluginData.FromString(content).session_start_info.hparams


def test_a_run_that_begins_anew_has_its_own_options_and_images(tmp_path):
    for seed in (0, 1):
        log = RunLog(tmp_path, enabled=True)
        log.open({"config": {"seed": seed}}, 0)
        log.write_images("train/images", 1, torch.full((2, 3, 8, 8), float(seed)))
        assert not log.wants_images
        log.close()
    (image,) = events(tmp_path).Images("train/images")
    assert Image.open(io.BytesIO(image.encoded_image_string)).getpixel((0, 0)) == (255, 255, 255)
    assert session(events(tmp_path))["seed"].number_value == 1


@pytest.mark.parametrize("options", [{}, {"cutmix": 1.0}, {"mixup": 1.0, "mixup_epochs": 1, "accumulate": 2}])
def test_the_images_are_those_that_the_network_saw(options, tmp_path):
    trainer, seen = build_trainer(tmp_path, images=16, **options), []
    trainer.progress.epoch = 1  # in which mixup has its whole strength
    trainer.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    plain = next(iter(trainer.loader)).images
    trainer.train_epoch()
    trainer.log.close()
    (image,) = events(tmp_path).Images("train/images")
    grid = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    count = len(seen[0])
    assert count == 16 // options.get("accumulate", 1)
    tiles = grid.reshape(count // 8, 32, 8, 32, 3).transpose(0, 2, 1, 3, 4).reshape(count, 32, 32, 3)
    preprocessing = trainer.config.preprocessing
    wanted = seen[0].permute(0, 2, 3, 1) * torch.tensor(preprocessing.std) + torch.tensor(preprocessing.mean)
    assert np.abs(tiles - 255 * wanted.clamp(0, 1).numpy()).max() <= 1
    assert torch.equal(seen[0], plain[:count]) == (not options)


# --- services ---

WANDB = """
import json
from pathlib import Path

STORE = Path("STORE_OF_CALLS")

def note(**what):
    with open(STORE, "a") as file:
        file.write(json.dumps(what) + "\\n")

class Run:
    def __init__(self, id):
        self.id, self.summary = id, {}
        if STORE.exists():
            for line in map(json.loads, STORE.read_text().splitlines()):
                self.summary.update(line.get("log", {}))

    def define_metric(self, name, step_metric):
        note(metric=[name, step_metric])

    def log(self, figures):
        SENDING
        note(log=figures)

    def finish(self):
        note(finish=True)

def init(project, name, dir, id, resume, config, allow_val_change):
    note(init={"project": project, "name": name, "id": id, "resume": resume, "lr": config["config"]["lr"]})
    return Run(id or "7")
"""
MLFLOW = """
import json
from pathlib import Path
from types import SimpleNamespace

STORE = Path("STORE_OF_CALLS")

def note(**what):
    with open(STORE, "a") as file:
        file.write(json.dumps(what) + "\\n")

def start_run(run_id, run_name):
    note(start=[run_id, run_name])
    return SimpleNamespace(info=SimpleNamespace(run_id=run_id or "7"))

def get_run(run_id):
    metrics = {}
    for line in map(json.loads, STORE.read_text().splitlines()):
        metrics.update(line.get("log", {}))
    return SimpleNamespace(data=SimpleNamespace(metrics=metrics))

def log_params(params):
    assert len(params) <= 100
    note(params=params)

def log_dict(content, name):
    note(file=name)

def log_metrics(figures, step):
    note(log=figures, step=step)

def end_run():
    note(finish=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a package that writes down the calls; gives a function that reads them."""

    def make(name: str, source: str):
        (tmp_path / "packages").mkdir(exist_ok=True)
        (tmp_path / "packages" / f"{name}.py").write_text(
            source.replace("STORE_OF_CALLS", str(tmp_path / f"{name}.calls"))
        )
        monkeypatch.syspath_prepend(tmp_path / "packages")
        return lambda: [json.loads(line) for line in (tmp_path / f"{name}.calls").read_text().splitlines()]

    for name in services.CLIENTS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield make
    for name in services.CLIENTS:
        sys.modules.pop(name, None)


def test_a_run_that_goes_on_has_everything_once(stand_in, main, tiny, tmp_path):
    """Also where a kill has left a service with lines of steps that are done again."""
    calls, run = (
        {"wandb": stand_in("wandb", WANDB.replace("SENDING", "pass")), "mlflow": stand_in("mlflow", MLFLOW)},
        tmp_path / "run",
    )
    command = [*SMALL, "-d", tiny, "-c", run, "-b", 12, "--epochs", 2, "--wandb", "--mlflow"]
    main(*command, "--stop-after-steps", 4)
    for name in calls:
        with open(tmp_path / f"{name}.calls", "a") as file:
            file.write(json.dumps({"log": {"train/global_step": 6, "train/loss": 9.0}}) + "\n")
    assert "warning" not in main(*command)

    found = events(run)
    assert [scalar.step for scalar in found.Scalars("train/loss")] == [2, 4, 6, 8]
    assert [scalar.step for scalar in found.Scalars("eval/top1")] == [4, 8]
    (image,) = found.Images("train/images")
    assert (image.step, image.width, image.height) == (1, 8 * 32, 2 * 32)
    assert session(found)["lr"].number_value == 0.005 and session(found)["arch"].string_value == "mobilenetv2_dcd"
    assert "resume" not in session(found), "an option without a value"

    found = {name: read_calls() for name, read_calls in calls.items()}
    wanted = [line for line in figures_of(run) if line.get("train/global_step") != 6]
    for name, each in found.items():
        sent = [call["log"] for call in each if "log" in call]
        assert [line for line in sent if line.get("train/loss") != 9.0] == wanted, name
        assert sum("finish" in call for call in each) == 2 and read(run, f"{name}.json") == {"run_id": "7"}
    first, second = (call["init"] for call in found["wandb"] if "init" in call)
    assert first == {"project": "dcd", "name": "run", "id": None, "resume": "allow", "lr": 0.005}
    assert second == {**first, "id": "7"} and {"metric": ["train/*", "train/global_step"]} in found["wandb"]
    assert [call["start"] for call in found["mlflow"] if "start" in call] == [[None, "run"], ["7", None]]
    parameters = {key: value for call in found["mlflow"] for key, value in call.get("params", {}).items()}
    assert parameters["lr"] == 0.005 and parameters["mlflow"] is True


def figures_of(run: Path) -> list[dict]:
    """What a service is to be sent of a run."""
    found = [line for kind in ("train", "eval") for line in lines(run, kind)]
    found.sort(key=lambda line: line["global_step"])
    return [{f"{line['kind']}/{name}": value for name, value in line.items() if name != "kind"} for line in found]


@pytest.fixture
def logged(stand_in, tmp_path, capsys):
    """The lines that a log of three steps says where sending one of them is `body`."""

    def log_with(body: str) -> list[str]:
        stand_in("wandb", WANDB.replace("SENDING", body))
        log = RunLog(tmp_path / "run", enabled=True)
        log.open({"config": {"lr": 0.1}}, 0, ("wandb",))
        for step in (1, 2, 3):
            log.write("train", step, loss=1.0)
        log.close({"top1": 1.0})
        assert len(lines(tmp_path / "run", "train")) == 3 and read(tmp_path / "run", "summary.json") == {"top1": 1.0}
        return capsys.readouterr().out.splitlines()

    return log_with


@pytest.mark.parametrize("body", ["raise ConnectionError('no network\\nat all')", "raise SystemExit('not logged in')"])
def test_a_service_that_fails_stops_nothing(body, logged):
    first, last = logged(body)
    assert first.startswith("warning: wandb fails (") and first.endswith("); the run goes on without")
    assert last == "warning: 3 of 3 lines of the log did not reach wandb"


def test_a_service_that_hangs_is_not_waited_for(logged, monkeypatch):
    monkeypatch.setattr(services, "PATIENCE_S", 0.1)
    assert logged("__import__('time').sleep(3600)") == ["warning: 3 of 3 lines of the log did not reach wandb"]


def test_a_service_that_is_not_installed(main, tiny, tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # as it makes one for its own files: no package
    monkeypatch.setattr(services, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    for name in services.CLIENTS:
        (line,) = error_lines(main(*SMALL, "-d", tiny, "-c", tmp_path / "run", "-b", 12, f"--{name}"))
        assert line == f"rank 0: error: --{name} needs the package {name}: pip install {name}"
    assert not (tmp_path / "run").exists()
