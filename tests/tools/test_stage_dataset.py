"""A dataset is copied to a machine's own disk once, or read where it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tools.stage_dataset import files_of, stage

SHARDS = ["train-00000-of-00002.beton", "train-00001-of-00002.beton", "val-00000-of-00001.beton"]
FILES = [*SHARDS, "train-00000-of-00002.checksums.npy", "dataset.json"]


@pytest.fixture
def data(tmp_path) -> Path:
    """Files of a dataset, of 1000 bytes each, among others."""
    folder = tmp_path / "imagenet"
    (folder / ".partial").mkdir(parents=True)
    for number, name in enumerate([*FILES, "part-00000-of-00002.json", "notes.txt"]):
        (folder / name).write_bytes(bytes([number]) * 1000)
    return folder


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {".lock"}


def test_it_is_copied_once(data, tmp_path, capfd):
    folder = stage(data, tmp_path / "disk")
    assert folder.parent == tmp_path / "disk" / f"dcd-{os.getuid()}" and names(folder) == set(FILES)
    assert all((folder / name).read_bytes() == (data / name).read_bytes() for name in FILES)
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert "copied 5 files, 0.000 GB, to" in capfd.readouterr().err
    before = {name: (folder / name).stat().st_ino for name in FILES}
    assert stage(data, tmp_path / "disk") == folder
    assert before == {name: (folder / name).stat().st_ino for name in FILES}
    assert f"{folder} is there already" in capfd.readouterr().err


def test_the_record_comes_last(data):
    """Shards without it are no dataset, so a copy that is not whole is none."""
    assert [file.name for file in files_of(data)][-1] == "dataset.json"


def test_an_interrupted_copy_is_continued(data, tmp_path, capfd):
    folder = stage(data, tmp_path / "disk")
    kept, cut, lost = (folder / name for name in SHARDS)
    inode = kept.stat().st_ino
    cut.write_bytes(b"half")
    lost.rename(folder / f".{lost.stem}.partial{lost.suffix}")
    assert stage(data, tmp_path / "disk") == folder and names(folder) == set(FILES)
    assert cut.stat().st_size == lost.stat().st_size == 1000 and kept.stat().st_ino == inode
    assert "copied 2 files" in capfd.readouterr().err


def test_changed_data_is_copied_anew(data, tmp_path):
    first = stage(data, tmp_path / "disk")
    os.utime(data / SHARDS[0], (1, 1))
    second = stage(data, tmp_path / "disk")
    assert second != first and names(second) == names(first)


def test_without_room_it_is_read_where_it_is(data, small_disk, capfd):
    disk = small_disk("64k")
    with open(data / SHARDS[0], "ab") as file:
        file.truncate(100_000)
    assert stage(data, disk) == data
    (line,) = capfd.readouterr().err.splitlines()
    assert f": no room at {disk}" in line and line.endswith(f"are free: {data} is read where it is")
    assert list(disk.rglob("*.beton*")) == []


def test_what_fails_to_be_copied_is_removed(data, tmp_path, capfd):
    """As by a quota, which no look at the free space shows."""
    folder = stage(data, tmp_path / "disk")
    (folder / SHARDS[0]).unlink()
    (folder / f".{Path(SHARDS[0]).stem}.partial.beton").mkdir()
    assert stage(data, tmp_path / "disk") == data and not folder.exists()
    assert f"{data} is read where it is: it cannot be copied to {folder}" in capfd.readouterr().err.splitlines()[-1]


def test_a_folder_of_somebody_else_is_not_used(data, tmp_path, capfd):
    """In /tmp anyone can make a folder of our name."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"dcd-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    assert stage(data, tmp_path) == data and list((tmp_path / "elsewhere").iterdir()) == []
    assert "belongs to somebody else" in capfd.readouterr().err


def test_two_calls_at_once_copy_once(data, tmp_path):
    command = [sys.executable, "-m", "tools.stage_dataset", str(data), str(tmp_path / "disk")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    calls = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    (first, said), (second, also_said) = (call.communicate(timeout=60) for call in calls)
    assert first == second and names(Path(first.rstrip("\n"))) == set(FILES)
    assert ["copied 5 files" in text for text in sorted([said, also_said], key=len)].count(True) == 1


def test_class_folders_are_read_where_they_are_and_a_wrong_name_is_an_error(tmp_path):
    (tmp_path / "train").mkdir()
    command = [sys.executable, "-m", "tools.stage_dataset", str(tmp_path), str(tmp_path / "disk")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{tmp_path}\n" and "holds no .beton files" in done.stderr
    command[3] = str(tmp_path / "nowhere")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith("error: ")
    assert not (tmp_path / "disk").exists()
