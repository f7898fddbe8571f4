"""What disks say when they are asked to keep something."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.sources.errors import DataError
from tools.conversion.writer import writing

ROOT = Path(__file__).parents[2]

# fsync that fails with the numbers in $FOLDERS and $FILES, where they are set
FAILING = """
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

int fsync(int file) {
    struct stat found;
    const char *number = fstat(file, &found) ? 0 : getenv(S_ISDIR(found.st_mode) ? "FOLDERS" : "FILES");
    if (!number) return syscall(SYS_fsync, file);
    errno = atoi(number);
    return -1;
}
"""

# What the writer of checkpoints and, in two of the cases, a conversion end with.
SCRIPT = """
import json, os, sys
from pathlib import Path
from training.checkpoint import CheckpointWriter
from tools.conversion.images import Options
from tools.make_dataset import make_dataset

src, out, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
found = {}
for case, variables in cases.items():
    os.environ.update(variables)
    found[case] = []
    if case in ("EINVAL", "EIO"):
        try:
            make_dataset(src, out / case, Options(), "error", 1)
        except Exception as error:
            found[case].append(f"{type(error).__name__}: {error}")
    writer = CheckpointWriter(out / "checkpoints" / case, 1, found[case].append)
    writer.save({"epoch": 0, "step": 0})
    writer.wait()
    for name in variables:
        del os.environ[name]
(out / "found.json").write_text(json.dumps(found))
"""


def test_a_folder_that_cannot_be_synced_loses_no_conversion_and_no_checkpoint(folder, tmp_path):
    """As on CIFS and FUSE. Files must be synced all the same, and a folder's disk must not fail."""
    (tmp_path / "failing.c").write_text(FAILING)
    library = tmp_path / "failing.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "failing.c"], check=True)
    cases = {
        "EINVAL": {"FOLDERS": str(errno.EINVAL)},
        "ENOTSUP": {"FOLDERS": str(errno.ENOTSUP)},
        "EIO": {"FOLDERS": str(errno.EIO)},
        "file": {"FILES": str(errno.EINVAL)},
    }
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", SCRIPT, folder, tmp_path, json.dumps(cases)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["EINVAL"] == found["ENOTSUP"] == []
    assert {"train.beton", "val.beton", "dataset.json"} <= set(os.listdir(tmp_path / "EINVAL"))
    conversion, checkpoint = found["EIO"]
    assert conversion.startswith(f"DataError: cannot write {tmp_path / 'EIO'}") and "\n" not in conversion
    assert "(Input/output error): its disk or network fails" in conversion and os.listdir(tmp_path / "EIO") == []
    assert "Input/output error" in checkpoint and "Invalid argument" in found["file"][0]


@pytest.mark.parametrize(
    "reason, advice",
    [
        (errno.ENOSPC, "make room there"),
        (errno.EDQUOT, "make room there"),
        (errno.EFBIG, "allows no such large file"),
        (errno.EROFS, "name a folder that can be written to"),
        (errno.EACCES, "name a folder that can be written to"),
        (errno.EIO, "look after it"),
        (errno.ENOTDIR, ": name another folder"),
    ],
)
def test_what_to_do_depends_on_the_reason(reason, advice):
    with (
        pytest.raises(DataError, match=f"cannot write here .{os.strerror(reason)}.: ") as caught,
        writing(Path("here")),
    ):
        raise OSError(reason, os.strerror(reason))
    assert advice in str(caught.value)
    assert ("make room" in advice) == ("make room" in str(caught.value))
