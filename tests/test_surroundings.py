"""Where a run finds little: small shared memory, no home, odd paths. Real processes."""

import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.cache import _usable, cache_folder
from tests.helpers import SMALL, command, error_lines
from training.command_line import parse
from training.config import Config, parse_config
from training.options import ConfigError
from training.recipes import RECIPES

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def with_shared_memory(size: str, *args, ranks: int | None = None) -> subprocess.Popen:
    """train_dist.py where /dev/shm has that size."""
    script = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("the kernel lets this user mount no tmpfs in a namespace of its own")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*prefix, *command(*args, ranks=ranks)], text=True, env=ENVIRONMENT, **pipes)


def output_of(process: subprocess.Popen) -> str:
    try:
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1, output
    return output


ADVICE = ("--shm-size=64m", "--ipc=host", "-j 0", "make dataset")


def test_shared_memory_that_is_too_small_is_said_at_the_start(tiny, tmp_path):
    args = [*SMALL, "--input-size", 128, "-d", tiny, "-c", tmp_path, "-b", 12]
    output = output_of(with_shared_memory("1m", *args, ranks=2))
    found = error_lines(output)
    # 6 images of 128 pixels in a batch; the evaluation has two of them
    assert found and all(
        "/dev/shm has 1.0 MiB free of 1.0 MiB" in line
        and "need 1.1 MiB (2 batches of 0.3 MiB for each of 2 ranks)" in line
        for line in found
    )
    assert all(word in line for line in found for word in ADVICE)
    assert "going on" not in output and "images/s" not in output and output.count("Traceback") == 1, "torchrun's own"


def test_shared_memory_that_others_fill_ends_the_run_with_the_same_line(tiny, tmp_path):
    process = with_shared_memory(
        "4m", *SMALL, "--input-size", 96, "-d", tiny, "-c", tmp_path, "-b", 12, "--epochs", 500
    )
    log, deadline = tmp_path / "metrics.jsonl", time.monotonic() + 100
    while not (log.exists() and log.stat().st_size):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.05)
    shared = Path(f"/proc/{process.pid}/root/dev/shm")
    with pytest.raises(OSError, match="No space left"), open(shared / "theirs", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    output = output_of(process)
    (line,) = error_lines(output)
    assert "shared memory has run out: /dev/shm has 0." in line and all(word in line for word in ADVICE)
    assert "it can go on from" in output and "Traceback" not in output


@pytest.fixture
def short_path():
    """A folder of its own: loading processes meet at a socket in TMPDIR, whose name may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="t") as folder:
        yield Path(folder)


def test_a_user_without_a_name_and_a_home_trains_on_paths_that_are_no_text(tiny, short_path):
    """In an environment that is empty, with a class, a data and an output folder that are no UTF-8."""
    base = Path(os.fsdecode(os.fsencode(short_path) + b"/caf\xe9"))
    data = shutil.copytree(tiny, base / "data")
    for split in ("train", "val"):
        (data / split / "0_zero").rename(data / split / base.name)
    base.chmod(0o777)
    short_path.chmod(0o755)
    only_reading = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search"]  # the interpreter is root's
    user = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups", *only_reading]
    user += ["env", "-i", f"PATH={os.environ['PATH']}", f"TMPDIR={base}"]
    if subprocess.run([*user, "true"], capture_output=True).returncode:
        pytest.skip("this user may not take the id of another")
    args = [*SMALL, "-d", data, "-c", base / "out", "-b", 12, "--epochs", 1]
    done = subprocess.run([*user, *command(*args)], capture_output=True, timeout=120)
    output = (done.stdout + done.stderr).decode()  # what is no text is escaped
    assert done.returncode == 0 and "results in" in output and r"caf\udce9/out" in output, output
    (warning,) = done.stderr.decode().splitlines()
    assert warning.startswith("warning: there is no home folder: caching in") and (base / "dcd-cache-54321").is_dir()
    left = {path.name for path in (base / "out").iterdir()}
    files = {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "summary.json", "status.json", ".lock"}
    assert left == files
    assert list((base / "out" / "tensorboard").glob("events.*"))


def test_a_home_that_is_the_root_or_cannot_be_written_to_is_none(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    temporary = tmp_path / f"dcd-cache-{os.getuid()}"
    for home, reason in (("/", "there is no home folder"), (f"{tmp_path}/file", "Not a directory")):
        monkeypatch.setenv("HOME", home)
        _usable.cache_clear()
        assert cache_folder() == temporary and cache_folder() == temporary
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: ") and reason in line
    temporary.chmod(0o777)  # where others may put code
    _usable.cache_clear()
    assert cache_folder() != temporary and cache_folder().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "dcd"


@dataclass(frozen=True)
class WithFile(Config):
    """The options of a program that has one of its own."""

    json: Path | None = None


def test_every_path_that_is_given_may_begin_with_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--checkpoint=~/run", "-d", "~/data", "--weight", "~/w.pth", "--resume=~/r.pth", "--json=~/out.json"]
    config = parse_config(options, RECIPES, WithFile())
    given = (config.run.checkpoint, config.data.root, config.model.weight, config.run.resume, config.json)
    assert given == tuple(tmp_path / name for name in ("run", "data", "w.pth", "r.pth", "out.json"))
    with pytest.raises(ConfigError, match="~nobodyatall/run: no home folder is known for it"):
        parse_config(["-c", "~nobodyatall/run"], RECIPES, Config())

    def tool(src: Path, out: Path | None = None) -> tuple[Path, Path | None]:
        return src, out

    assert parse(tool, args=["~/src", "--out", "~"]) == (tmp_path / "src", tmp_path)
    assert parse(tool, args=["a~/src"]) == (Path("a~/src"), None)
