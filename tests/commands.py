"""Tries a command that a document names, as far as it can be tried without carrying it out.

Our programs begin as they do for a user, as `__main__`, and end where they have read their options (`Parsed`). Commands
of others are only looked at by `bash -n`.
"""

import argparse
import functools
import inspect
import re
import runpy
import shlex
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from torch.distributed.run import parse_args as parse_torchrun

import training.command_line
import training.config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
OURS = ("tools.", "benchmarks.", "tests.", "train_dist")
OTHERS = {"apt-get", "docker", "kubectl", "pip", "source", "ssh", "tensorboard"}
PYTHON = {"python", "python3"}
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


class Parsed(BaseException):
    """A program has read its options, and would begin."""


def is_command(line: str) -> bool:
    """Whether it begins with a program that there are rules for."""
    known = PYTHON | OTHERS | {"make", "torchrun", "srun", "sbatch", "train_dist.py"}
    words = line.removeprefix(".venv/bin/").split()
    words = words[1:] if words and re.match(r"[A-Z_]+=", words[0]) else words
    return bool(words) and (words[0] in known or (words[0].startswith("dcd-") and words[0] != "dcd-NAME"))


def words_of(line: str) -> list[str]:
    """A command line without its comment, variables before it, and the folder of its program."""
    words = shlex.split(line.replace("$SLURM_ARRAY_TASK_ID", "3"), comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return [words[0].removeprefix(".venv/bin/"), *words[1:]] if words else []


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """The module that a command starts as a program, by itself or on many ranks, and its arguments.

    Raises:
        AssertionError: torchrun, by its own parser, or pyproject.toml knows nothing of it.
    """
    match words:
        case ["torchrun", *arguments]:
            try:
                found = parse_torchrun(arguments)
            except SystemExit as error:
                raise AssertionError("torchrun does not take this") from error
            command = [found.training_script, *found.training_script_args]
            how = [] if found.no_python else ["python", "-m"] if found.module else ["python"]
            return program_of([*how, *command])
        case ["srun", "-n", _, *command]:
            return program_of(command)
        case [python, "-W", _, *arguments] if python in PYTHON:
            return program_of([python, *arguments])
        case [python, "-m", module, *arguments] if python in PYTHON:
            return module, arguments
        case [python, script, *arguments] if python in PYTHON and script.endswith(".py"):
            return script.removesuffix(".py"), arguments
        case ["train_dist.py", *arguments]:
            return "train_dist", arguments
        case [program, *arguments] if program.startswith("dcd-"):
            assert program in SCRIPTS, f"pyproject.toml makes no command {program}"
            return SCRIPTS[program].partition(":")[2], arguments
    return None


def try_command(words: list[str], whole: bool = True) -> None:
    """Raise AssertionError with what is wrong with a command; not `whole` ones may leave arguments out."""
    match [word for word in words if word != "…"]:
        case ["make", *arguments]:
            try_make(arguments, whole)
        case ["pip", "install", *what]:
            try_extras(what)
        case ["sbatch", *arguments]:
            scripts = [word for word in arguments if word.endswith(".sh")]
            assert all((ROOT / script).is_file() for script in scripts), f"no such script: {scripts}"
        case ["torchrun", *options] if not whole and all(re.match(r"--|\d", option) for option in options):
            program_of(["torchrun", *options, "train_dist.py"])
        case command if program := program_of(command):
            try_program(*program, whole)
        case [name, *arguments]:
            assert name in OTHERS or not (whole or arguments), f"no rule for it in tests/commands.py: {words}"


def started_by_make(arguments: list[str]) -> list[list[str]]:
    """The programs of ours that make would start, as words of their command lines, by `make -n`."""
    done = subprocess.run(["make", "-n", *arguments, "RANKS=2"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    ours = r"(\.venv/bin/)?(torchrun|python3?) (-m (tools|benchmarks|tests)\.|--)"
    return [words_of(line) for line in lines if re.match(ours, line)]


def try_make(arguments: list[str], whole: bool) -> None:
    """A target and the programs that it would start. In a text it may stand without its variables: it must exist."""
    if not whole and not any("=" in argument for argument in arguments):
        text = (ROOT / "Makefile").read_text()
        missing = [target for target in arguments if not re.search(rf"^{target}:.*## ", text, re.MULTILINE)]
        assert not missing, f"the Makefile explains no {missing}"
        return
    for command in started_by_make(arguments):
        try_command(command)


def try_program(module: str, arguments: list[str], whole: bool) -> None:
    """Let it read its options."""
    if not module.startswith(OURS) or (not whole and not arguments):
        assert find_spec(module), f"there is no {module}"
        return
    problem = begin(module, arguments)
    if problem and (whole or not problem.startswith("missing: ")):
        raise AssertionError(problem)


def begin(module: str, arguments: list[str]) -> str | None:
    """Start a program of ours as its user does, up to where its options are read; what is wrong with them."""

    def stop_behind(read: Any) -> Any:
        def reading(*args: Any, **options: Any) -> NoReturn:
            read(*args, **options)
            raise Parsed

        return reading

    def only_read(program: Any, **options: Any) -> None:
        if inspect.isfunction(program):
            program = functools.wraps(program)(lambda *args, **options: None)
        training.command_line.read_options(program, **options)

    readers = {
        (training.command_line, "parse"): only_read,
        (training.config, "parse_config"): training.config.parse_config,
        (argparse.ArgumentParser, "parse_args"): argparse.ArgumentParser.parse_args,
    }
    before, argv = {place: getattr(*place) for place in readers}, sys.argv
    try:
        for place, read in readers.items():
            setattr(*place, stop_behind(read))
        sys.argv = [module, *arguments]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # that it has been imported before
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Parsed:
        return None
    except training.command_line.OptionError as error:
        return str(error)
    except SystemExit as error:
        return None if not error.code else str(error.code)  # 0 of --help
    finally:
        sys.argv = argv
        for place, read in before.items():
            setattr(*place, read)
    return f"{module} ended without reading its options"


def try_extras(what: list[str]) -> None:
    """`pip install 'dcd-trainer[train]'`, also as a wheel or a folder: there are such extras."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name in re.findall(r"(?:dcd|WHEEL|checkout)\S*\[(.*)\]", " ".join(what)):
        assert set(name.split(",")) <= set(extras), f"pyproject.toml has no extra {name}"
