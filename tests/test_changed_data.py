"""Whole runs whose data changes under them: what has gone is named, and what is other is not gone on with."""

import shutil
from pathlib import Path
from threading import Thread

import pytest
import torch

from tests.helpers import SMALL, difference, error_lines, last, read, run
from tests.processes import until

COMMON = [*SMALL, "-b", 12, "--epochs", 6, "-j", 1, "-p", 1]


def lose(victim: Path, log: Path) -> None:
    """Remove a file when training is in its first epoch; it is read again in every later one."""
    until(lambda: log.exists() and '"train"' in log.read_text(), every=0.002)
    victim.unlink()


@pytest.mark.parametrize("backend", ["torchvision", "dali"])
def test_a_file_that_vanishes_is_named_and_nothing_is_lost(tiny, tmp_path, main, backend):
    data, out = shutil.copytree(tiny, tmp_path / "data"), tmp_path / "out"
    main(*COMMON, "-d", data, "-c", tmp_path / "whole", "--backend", backend)
    common = [*COMMON, "-d", data, "-c", out, "--backend", backend]
    victim = sorted((data / "train").rglob("*.JPEG"))[17]
    content = victim.read_bytes()
    thread = Thread(target=lose, args=(victim, out / "metrics.jsonl"))
    thread.start()
    output = main(*common)
    thread.join()
    (line,) = error_lines(output)
    assert f"error: cannot read {victim} (No such file or directory): put the file back and start again" in line
    assert read(out, "status.json")["state"] == "failed" and f"it can go on from {out}" in output
    state = last(out)  # it is whole
    assert 1 <= state["epoch"] * 4 + state["step"] < 24

    (line,) = error_lines(main(*common))  # without the file
    assert "is of other training images (48 there, 47 here)" in line
    victim.write_bytes(content)
    assert "going on from" in main(*common)
    found, expected = last(out), last(tmp_path / "whole")
    found.pop("config"), expected.pop("config")
    assert difference(found, expected) == []


def test_other_images_are_refused_by_every_rank_and_older_checkpoints_go_on(tiny, tmp_path, main):
    data, out = shutil.copytree(tiny, tmp_path / "data"), tmp_path / "out"
    common = [*SMALL, "-b", 12, "--epochs", 1, "-d", data, "-c", out]
    main(*common, "--stop-after-steps", 1)
    before = (out / "checkpoints" / "last.pth").read_bytes()
    victim = sorted((data / "train").rglob("*.JPEG"))[17]
    victim.rename(victim.with_name("another.JPEG"))
    lines = error_lines(run(*common, ranks=2, fails=True))
    assert lines and all("of other training images (with other names of files)" in line for line in lines)
    assert (out / "checkpoints" / "last.pth").read_bytes() == before

    state = last(out)
    state.pop("data")
    torch.save(state, out / "checkpoints" / "last.pth")
    output = main(*common)
    assert output.count("the checkpoint does not say on which images it was trained") == 1
    assert "going on from" in output and read(out, "summary.json")["epochs"] == 1
