"""Carries out what a document says to type: in this process, on one rank, with a tiny network and tiny data.

A command keeps its words. Those that make it large are overridden by others behind them, its paths begin in the current
folder, and the network, MobileNetV2, has two blocks.
"""

import runpy
import signal
import sys
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from tests.commands import program_of, started_by_make
from tests.helpers import MODEL, SMALL

# Options that make a program small, behind its own,
SMALLER = {
    "train_dist": [*SMALL, "-b", "16", "--epochs", "1"],
    "tools.evaluate": [*MODEL.split(), "-b", "16", "-j", "1", "--amp", "off"],
    "tools.predict": MODEL.split(),
    "tools.export": [*MODEL.split(), "--window-s", "0.01"],
    "tools.convert_checkpoint": MODEL.split(),
    "tools.make_dataset": ["--workers", "1"],
    "tools.check_dataset": ["--workers", "1"],
    "tools.profile_throughput": [*SMALL, "-b", "16", "--windows", "1", "--window-steps", "1"],
    "tools.count_kernels": ["--batch-size", "2", "--size", "32"],
    "benchmarks.compare_pixels": ["--images", "4", "--backends", "torchvision"],
    "benchmarks.make_fake_imagenet": ["--train-images", "16", "--val-images", "16"],
    "benchmarks.bench_conversion": ["--rounds", "1"],
}
# what no option overrides,
REPLACED = {("tools.count_kernels", "resnet50_dcd"): "mobilenetv2_dcd"}
# and options by a word of the command.
SMALLER_STILL = {
    "--teacher": ["--teacher", "mobilenetv2_dcd"],
    "--profile": ["--profile", "2"],
    "runs/demo": ["-b", "479", "--no-warmup"],  # three steps
    "--stop-after-steps": ["--stop-after-steps", "1"],
}


def carry_out(words: list[str]) -> None:
    """Carry out a command of ours, or the programs that make would start, in the current folder.

    A link that is there for a folder that the command makes is removed first.

    Raises:
        AssertionError: it has ended with an error.
    """
    if words[0] == "make":
        commands = started_by_make(words[1:])
        assert commands, f"{words} starts no program of ours"
        for command in commands:
            carry_out(command)
        return
    program = program_of(words)
    assert program is not None, words
    module, arguments = program
    arguments = [word.removeprefix("/") if word.startswith("/path/to/") else word for word in arguments]
    arguments = [REPLACED.get((module, word), word) for word in arguments]
    made = _made_by(module, arguments)
    if made is not None and made.is_symlink():
        made.unlink()
    smaller = [*SMALLER.get(module, []), *(more for word in arguments for more in SMALLER_STILL.get(word, []))]
    with _settings_kept(), patch("dcd.models.mobilenet_v2.STAGES", ((6, 16, 1, 2), (6, 24, 1, 2))):
        sys.argv = [module, *arguments, *smaller]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as error:
            assert not error.code, f"{' '.join(words)}\n{error.code}"


def _made_by(module: str, arguments: list[str]) -> Path | None:
    """The folder that a command makes."""
    if module == "train_dist" and "-c" in arguments and "--evaluate" not in arguments:
        return Path(arguments[arguments.index("-c") + 1])
    return Path(arguments[1]) if module == "tools.make_dataset" else None


@contextmanager
def _settings_kept() -> Generator[None]:
    """What programs set for all of their process."""
    argv, precision = sys.argv, torch.get_float32_matmul_precision()
    convolutions, benchmark = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that a program has been imported before
            yield
    finally:
        sys.argv = argv
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = convolutions, benchmark
        signal.set_wakeup_fd(-1)
        for number, handler in handlers.items():
            signal.signal(number, handler)
