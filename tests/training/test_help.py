"""`--help` on two screens and `--help all` with every option, on terminals of any width."""

import os
import subprocess
import sys

import pytest

from dcd import list_models
from tests.helpers import ROOT, command, environment
from training.command_line import USUAL, options_of
from training.config import Config, parse_config
from training.recipes import RECIPES

TITLES = ["model", "data", "augmentation", "optimisation", "precision and speed", "run"]


@pytest.fixture
def printed(capsys, monkeypatch):
    """What a command line with --help prints where a terminal has so many columns."""

    def call(line: str, columns: int = 100) -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as stop:
            parse_config(line.split(), RECIPES, Config())
        assert stop.value.code == 0
        return capsys.readouterr().out

    return call


def test_the_usual_options_fit_on_two_screens(printed):
    text = printed("--help")
    lines = text.splitlines()
    assert len(lines) <= 100 and max(map(len, lines)) <= 100
    assert [line for line in lines if line in TITLES] == TITLES
    usual = [option for option in options_of(Config()) if USUAL in option.marks]
    assert [option.name for option in usual if f"{option.flag} " not in text] == []
    assert "--dali-full-decode" not in text and "--help all" in text
    assert all(f"{name}," in text or f" {name}\n" in text for name in list_models())
    assert all(f"{name} (" in " ".join(text.split()) for name in RECIPES)
    assert "Images in an optimizer step, over all ranks. [256]" in text


@pytest.mark.parametrize("line", ["--help all", "-h all", "--help=all"])
def test_all_options_are_listed_with_their_other_names(printed, line):
    text = printed(line)
    flags = [flag for option in options_of(Config()) if option.kind is not bool for flag in option.flags]
    switches = [option for option in options_of(Config()) if option.kind is bool]
    flags += [f"--no-{option.flag[2:]}" if option.default else option.flag for option in switches]
    assert [flag for flag in flags if f"{flag} " not in text and f"{flag}," not in text] == []


def test_the_defaults_are_those_of_the_recipe(printed):
    assert "Epochs in all. [16]" in printed("--recipe resnet50_dcd_fast --help")


@pytest.mark.parametrize("columns", [1, 20, 40, 80, 81, 300])
def test_any_width(printed, columns):
    """Only flags with their values, and single words, may be wider than a narrow terminal."""
    wide = [line for line in printed("--help", columns).splitlines() if len(line) > min(100, max(20, columns))]
    assert [line for line in wide if len(line.split()) > 1 and not line.startswith(("  -", "usage"))] == []
    assert columns < 80 or not wide


def test_one_rank_prints_for_all(printed, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert printed("--help") == ""


def test_a_reader_may_leave():
    """As `head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command("--help"), stdout=writer, stderr=subprocess.PIPE, env=environment())
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_process_without_a_terminal():
    env = {name: value for name, value in environment().items() if name not in ("COLUMNS", "TERM")}
    done = subprocess.run(command("--help"), capture_output=True, text=True, env=env, stdin=subprocess.DEVNULL)
    assert done.returncode == 0 and not done.stderr and len(done.stdout.splitlines()) <= 100
    of_tool = [sys.executable, "-m", "tools.profile_throughput", "--help"]
    done = subprocess.run(of_tool, capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0 and "--window-steps INT" in done.stdout and "\nthis program\n" in done.stdout
