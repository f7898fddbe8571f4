"""Whole runs of train_dist.py and what they leave, and a trainer in this process, for tests of every room."""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

import dcd
from pipelines.build import build_loader
from pipelines.config import DataConfig
from tests.processes import start_command, warm_python
from training.config import Config
from training.distributed import Ranks
from training.evaluator import Evaluator
from training.freezing import freeze_all_but_classifier
from training.lockstep import Lockstep
from training.run_log import RunLog
from training.trainer import Trainer

ROOT = Path(__file__).parents[1]
MODEL = "-a mobilenetv2_dcd --width-mult 0.1 --fc-squeeze 16"
# In float32 wherever it runs: what --amp auto becomes depends on the processor. A run that hangs says where, before
# `run` has had enough.
SMALL = f"{MODEL} --input-size 32 --lr 0.005 -p 2 -j 2 --amp off --timeout 240".split()
CPU = Ranks(rank=0, local_rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


def command(*args, ranks: int | None = None, launcher: list[str] | None = None) -> list[str]:
    """Of a run by Python alone, or by torchrun with `launcher` among its options."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *(launcher or [])]
    return [sys.executable, *(torchrun if ranks else []), str(ROOT / "train_dist.py"), *map(str, args)]


def run(*args, ranks: int | None = None, torchrun: bool = False, fails: bool = False, module: str | None = None) -> str:
    """Standard output and error together, of a run of train_dist.py, or of a module.

    It ends well, or all of its ranks fail; a hang is a failure. It is started by torchrun, or by a Python that has
    imported everything: that saves seconds for each rank, and those of torchrun itself. However it ends, no thread of a
    process group may live on: it could abort the process in Python's last moments.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        if torchrun:
            job = start_command(command(*args, ranks=ranks), log)
        else:
            job = warm_python().start(*args, ranks=ranks or 1, output=log, module=module)
        try:
            codes = job.wait()
        finally:
            job.end()
        output = job.output
    assert all((code != 0) == fails for code in codes), output
    assert "ends with threads of its process group" not in output, output
    return output


def environment() -> dict[str, str]:
    """Of the processes that tests start."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests" / "at_exit")}


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def lines(folder: Path, kind: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.pth", weights_only=True)


def difference(found, expected, where: str = "") -> list[str]:
    """Where two checkpoints are not equal bit for bit."""
    if isinstance(expected, torch.Tensor):
        return [] if torch.equal(found, expected) else [where]
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        return [path for key in expected for path in difference(found[key], expected[key], f"{where}/{key}")]
    if isinstance(expected, list):
        return [
            path
            for i, pair in enumerate(zip(found, expected, strict=True))
            for path in difference(*pair, f"{where}/{i}")
        ]
    return [] if found == expected else [where]


def part_of(digits: Path, out: Path, counts: dict[str, list[int]]) -> Path:
    """The first images of the first classes of each split, copied to `out`."""
    for split, of_classes in counts.items():
        for folder, count in zip(sorted((digits / split).iterdir()), of_classes, strict=False):
            (out / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, out / split / folder.name)
    return out


def error_lines(output: str) -> list[str]:
    """The lines by which the ranks of a run say what is wrong."""
    return [line for line in output.splitlines() if line.startswith("rank ") and ": error: " in line]


def build_trainer(tmp_path, images: int = 64, **options) -> Trainer:
    """A trainer on synthetic data: 16 images in a step."""
    options = {"amp": "off", **options}
    config = Config().with_options(arch="mobilenetv2_dcd", num_classes=5, batch_size=16, checkpoint=tmp_path, **options)
    data = DataConfig(backend="synthetic", batch_size=16, input_size=32, synthetic_images=images, synthetic_classes=5)
    torch.manual_seed(0)
    model = dcd.create_model("mobilenetv2_dcd", 5, width_mult=0.1, fc_squeeze=16).to(memory_format=torch.channels_last)
    if config.optim.freeze:
        freeze_all_but_classifier(model)
    train_loader, eval_loader = (build_loader(data, split) for split in ("train", "val"))
    log = RunLog(tmp_path, enabled=True)
    evaluator = Evaluator(config, CPU, model, eval_loader, Lockstep(CPU, config.run.timeout), log)
    trainer = Trainer(config, CPU, model, train_loader, evaluator, log)
    log.open({}, 0)
    return trainer


def whole_and_gone_on(tmp_path, **options) -> tuple[Trainer, Trainer]:
    """After an epoch: a trainer that was not stopped, and one that went on from where another stopped, two steps in."""
    whole, first = build_trainer(tmp_path, **options), build_trainer(tmp_path, stop_after_steps=2, **options)
    whole.train_epoch()
    first.train_epoch()
    first.saver.save()
    first.saver.finish()
    second = build_trainer(tmp_path, **options)
    second.saver.resume(last(tmp_path))
    assert second.progress.step == 2
    second.train_epoch()
    return whole, second
