"""Files that are there whole or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from training.whole_files import whole_files


def test_they_take_their_names_at_the_end_all_of_them(tmp_path):
    (tmp_path / "a.json").write_text("old")
    with whole_files(tmp_path / "a.json", tmp_path / "b.onnx") as files:
        for file in files:
            file.write_text("new")
        assert (tmp_path / "a.json").read_text() == "old" and not (tmp_path / "b.onnx").exists()
        assert [file.suffix for file in files] == [".json", ".onnx"], "some readers go by it"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.json": "new", "b.onnx": "new"}


def test_after_an_error_what_was_there_is_there(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_files(tmp_path / "a", tmp_path / "b") as (a, b):
        a.write_text("new")
        b.write_text(str(1 / 0))
    with pytest.raises(OSError), whole_files(tmp_path / "a", tmp_path / "b") as (a, _):  # of which one is not written
        a.write_text("new")
    with pytest.raises(OSError), whole_files(tmp_path / "no folder" / "a") as (a,):
        a.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "old"


@pytest.mark.parametrize("alone", [True, False])
def test_what_a_killed_process_has_left_is_in_nobody_s_way(tmp_path, alone):
    script = """
import os, sys
from pathlib import Path
from training.whole_files import whole_files
with whole_files(Path(sys.argv[1]), alone=bool(int(sys.argv[2]))) as (file,):
    file.write_text("half of it, and long")
    os._exit(9)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "a", str(int(alone))], cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 9 and not (tmp_path / "a").exists() and len(os.listdir(tmp_path)) == 1
    with whole_files(tmp_path / "a", alone=alone) as (file,):
        file.write_text("new")
    assert (tmp_path / "a").read_text() == "new"
    assert len(os.listdir(tmp_path)) == (1 if alone else 2), "alone, it is written over"


def test_what_is_no_plain_file_is_written_to_as_it_is(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "behind")
    (tmp_path / "behind").write_text("old")
    with whole_files(tmp_path / "link") as (file,):
        file.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "behind").read_text() == "new"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    with whole_files(pipe) as (file,):
        assert file == pipe
        file.write_text("new")
    assert reader.communicate(timeout=60)[0] == "new" and pipe.is_fifo()
