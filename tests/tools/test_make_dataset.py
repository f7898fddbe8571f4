"""Converted datasets: the same from every form of ImageNet, read by stock FFCV, and whole or not there."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines import native
from pipelines.sources.beton import BetonSource
from pipelines.sources.errors import DataError
from tools.conversion import images as conversion_images
from tools.conversion import writer
from tools.conversion.images import Options
from tools.make_dataset import main, make_dataset

WNIDS = ["n01440764", "n02119789", "n15075141"]
FILES = ["dataset.json", "train.beton", "train.checksums.npy", "val.beton", "val.checksums.npy"]
FORK = multiprocessing.get_context("fork")


def convert(src, out, on_bad="error", workers=2, **options):
    make_dataset(src, out, Options(**options), on_bad, workers)
    assert sorted(os.listdir(out)) == FILES
    return json.loads((out / "dataset.json").read_text())


def content(out, split):
    """(labels, sizes, bytes of each image)."""
    source = BetonSource(out / f"{split}.beton")
    return source.labels.tolist(), source.sizes.tolist(), [source.read(i).tobytes() for i in range(len(source))]


def refused(src, out, *words, **options):
    """The conversion ends in an error of one line with these words, and nothing is left."""
    with pytest.raises(DataError) as caught:
        convert(src, out, **options)
    message = str(caught.value)
    assert "\n" not in message and ": " in message
    for word in words:
        assert word in message, message
    assert not out.exists() or os.listdir(out) == []


@pytest.fixture(scope="module")
def verbatim(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "verbatim"
    convert(folder, out)
    return out


# --------------------------------------------------------------------------------------------------------- what is made


def test_every_form_of_imagenet_gives_the_same_dataset(images, folder, tars, kaggle, shards, tmp_path):
    sources = {"ImageFolder": folder, "official tars": tars, "Kaggle": kaggle, "Hugging Face": shards}
    for kind, src in sources.items():
        before = sorted((path, path.stat().st_mtime_ns) for path in src.rglob("*"))
        dataset = convert(src, tmp_path / kind)
        assert sorted((path, path.stat().st_mtime_ns) for path in src.rglob("*")) == before
        assert dataset["classes"] == WNIDS
        assert dataset["source"] == {"kind": kind, "path": str(src)}
        for split, expected in images.items():
            labels, _, stored = content(tmp_path / kind, split)
            assert labels == [WNIDS.index(wnid) for wnid, _, _ in expected]
            assert stored == [data for _, _, data in expected]  # the files' bytes, untouched


def test_the_record_is_complete_and_the_checksums_are_those_of_the_bytes(images, folder, verbatim):
    dataset = json.loads((verbatim / "dataset.json").read_text())
    assert dataset["format"] == 1 and dataset["options"] == {"mode": "verbatim", "on_bad": "error"}
    assert {"python", "ffcv", "numpy"} <= set(dataset["versions"])
    for split, expected in images.items():
        found = dataset["splits"][split]
        checksums = np.load(verbatim / found["checksums"])
        source = BetonSource(verbatim / found["file"])
        assert source.classes == WNIDS and np.array_equal(source.checksums, checksums)
        assert checksums.tolist() == [native.checksum(np.frombuffer(data, np.uint8)) for _, _, data in expected]
        assert found["images"] == len(expected) and found["bytes"] == (verbatim / found["file"]).stat().st_size
        assert found["index_xxh64"] == source.index_checksum()
        assert found["checksums_xxh64"] == native.hex_checksum(checksums)
        assert found["reencoded"] == found["skipped"] == []


def load_with_stock_ffcv(beton, result):
    """Save the pixels and labels that FFCV's own loader gives."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption

    crop = RandomResizedCropRGBImageDecoder((64, 64), scale=(1, 1), ratio=(1, 1))  # the whole of a square image
    loader = Loader(
        str(beton),
        batch_size=5,
        num_workers=1,
        order=OrderOption.SEQUENTIAL,
        pipelines={"image": [crop], "label": [IntDecoder()]},
        drop_last=False,
    )
    batches = [(pixels.copy(), labels.copy()) for pixels, labels in loader]
    pixels, labels = (np.concatenate(column) for column in zip(*batches, strict=True))
    np.savez(result, pixels=pixels, labels=labels.ravel())


@pytest.mark.parametrize("options", [{}, {"mode": "reencode", "max_size": 64, "jpeg_fraction": 0.5}])
def test_stock_ffcv_reads_the_files(folder, tmp_path, options):
    convert(folder, tmp_path / "out", **options)
    source = BetonSource(tmp_path / "out" / "train.beton")
    assert set(source.is_raw.tolist()) == ({True, False} if options else {False})
    process = FORK.Process(target=load_with_stock_ffcv, args=(source.path, tmp_path / "found.npz"))
    process.start()  # not in this process, whose recursion limit FFCV's compiler confuses
    process.join(100)
    assert process.exitcode == 0
    with np.load(tmp_path / "found.npz") as found:
        pixels, labels = found["pixels"], found["labels"]
    assert labels.tolist() == source.labels.tolist()
    for i in np.flatnonzero((source.sizes == 64).all(1)):  # these are neither cut nor resized
        stored = source.read(i)
        difference = np.abs(
            pixels[i] - (stored.reshape(64, 64, 3) if source.is_raw[i] else native.decode_jpeg(stored)).astype(int)
        )
        # FFCV decodes JPEGs by the fast transforms.
        assert difference.max() == 0 if source.is_raw[i] else difference.mean() < 3


def test_reencode_makes_the_bytes_that_ffcvs_own_writer_makes(folder, tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter
    from torchvision.datasets import ImageFolder

    convert(folder, tmp_path / "ours", mode="reencode", max_size=70, quality=85)
    fields = {"image": RGBImageField("jpg", max_resolution=70, jpeg_quality=85), "label": IntField()}
    DatasetWriter(str(tmp_path / "ffcv.beton"), fields, num_workers=1).from_indexed_dataset(
        ImageFolder(str(folder / "train"))
    )
    ours, theirs = BetonSource(tmp_path / "ours" / "train.beton"), BetonSource(tmp_path / "ffcv.beton")
    assert ours.sizes.tolist() == theirs.sizes.tolist() and ours.sizes.max() == 70
    assert all(np.array_equal(ours.read(i), theirs.read(i)) for i in range(len(ours)))


def test_which_images_are_raw_depends_on_their_place_alone(folder, tars, tmp_path):
    options = {"mode": "reencode", "jpeg_fraction": 0.3}
    for name, src, workers in (("a", folder, 1), ("b", folder, 3), ("c", tars, 2)):
        convert(src, tmp_path / name, workers=workers, **options)
    raw = BetonSource(tmp_path / "a" / "train.beton").is_raw
    assert raw.sum() == 26 and raw[:12].sum() in (8, 9)  # of 36; the classes have their shares
    for split in ("train", "val"):
        assert content(tmp_path / "a", split) == content(tmp_path / "b", split) == content(tmp_path / "c", split)
        files = [(tmp_path / name / f"{split}.beton").read_bytes() for name in "ab"]
        assert files[0] == files[1]  # however many workers


def test_pages_hold_whole_images_in_the_order_of_storage(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(writer, "MIN_PAGE_SIZE", 1 << 21)
    convert(folder, tmp_path / "out", mode="reencode", max_size=400, jpeg_fraction=0)
    source = BetonSource(tmp_path / "out" / "train.beton")
    page = int(np.frombuffer(source.data[4:8].tobytes(), "<u4")[0])
    assert page == 1 << 21 and source.offsets.min() == page
    assert (source.offsets // page == (source.offsets + source.lengths - 1) // page).all()
    layout = writer._Layout(1234, 1000)
    assert layout.place(np.array([600, 400, 1, 999, 1000, 1])).tolist() == [2000, 2600, 3000, 3001, 4000, 5000]
    assert layout.place(np.array([1000])).tolist() == [6000]


# ------------------------------------------------------------------------------------------------- whole, or not there


def slowly(seconds):
    """`convert` of one image, after a pause."""

    def run(data, index, options):
        time.sleep(seconds)
        return conversion_images.convert(data, index, options)

    return run


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def begin(src, out):
    """A conversion in a process of its own, when its workers have begun."""
    process = FORK.Process(target=make_dataset, args=(src, out, Options(), "error", 2))
    process.start()
    wait_for((out / ".partial" / "train.beton").exists)
    time.sleep(0.2)
    return process


def test_after_a_kill_the_next_start_makes_the_same_files(monkeypatch, folder, verbatim, tmp_path):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "convert", slowly(0.05))
        process = begin(folder, out)
        with pytest.raises(DataError, match="another conversion is writing"):
            make_dataset(folder, out, Options(), "error", 1)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert os.listdir(out) == [".partial"]
    convert(folder, out)
    assert all((out / name).read_bytes() == (verbatim / name).read_bytes() for name in FILES)


def run_main(errors, *arguments, **options):
    """The command, in a process that has been forked; the file `errors` gets what it says at its end."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
    with open(errors, "w") as file, contextlib.redirect_stderr(file):
        try:
            main(*arguments, **options)
        except SystemExit as end:
            if isinstance(end.code, str):
                file.write(end.code)
            raise


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_leaves_nothing_and_says_so(monkeypatch, folder, tmp_path, number):
    monkeypatch.setattr(writer, "convert", slowly(1))
    out, errors = tmp_path / "out", tmp_path / "errors"
    process = FORK.Process(target=run_main, args=(errors, folder, out))
    process.start()
    wait_for((out / ".partial" / "train.beton").exists)
    time.sleep(0.2)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C does
    else:
        os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == 128 + number and os.listdir(out) == []
    assert re.fullmatch(r"error: stopped: .*\n", errors.read_text())


def test_a_stop_in_the_middle_of_a_fork_is_not_lost(monkeypatch, folder, tmp_path):
    """Python drops an exception that a signal raises in what it calls around a fork; any thread may get the signal."""

    def stop():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)  # until the other thread has got it

    def stopped_at_fork(*arguments):
        threading.Thread(target=time.sleep, args=(100,), daemon=True).start()
        os.register_at_fork(after_in_parent=stop)
        run_main(*arguments)

    writer.load_ffcv()  # here, since its import takes seconds
    monkeypatch.setattr(writer, "convert", slowly(1))
    out, errors = tmp_path / "out", tmp_path / "errors"
    process = FORK.Process(target=stopped_at_fork, args=(errors, folder, out))
    process.start()
    process.join(20)
    assert process.exitcode == 130 and os.listdir(out) == []
    assert errors.read_text().startswith("error: stopped: ")


def test_a_rename_that_was_interrupted_is_finished(folder, verbatim, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(verbatim, out / ".partial")
    (out / ".partial" / "train.beton").rename(out / "train.beton")
    convert(folder, out)
    assert "is there already" in capsys.readouterr().out


def test_what_is_there_already_stays(folder, tars, verbatim, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in verbatim.iterdir()}
    convert(folder, verbatim)
    assert "is there already" in capsys.readouterr().out
    for src, options in ((tars, {}), (folder, {"mode": "reencode"})):
        with pytest.raises(DataError, match="holds another dataset .*: remove it, or name another folder"):
            convert(src, verbatim, **options)
    assert {path: path.stat().st_mtime_ns for path in verbatim.iterdir()} == before
    (tmp_path / "val.beton").write_text("mine")
    with pytest.raises(DataError, match="holds val.beton but no dataset.json"):
        convert(folder, tmp_path)
    assert (tmp_path / "val.beton").read_text() == "mine"


def test_out_in_the_source_is_refused(folder):
    for out in (folder, folder / "train", folder / "ffcv"):
        with pytest.raises(DataError, match="name a folder outside the source"):
            make_dataset(folder, out, Options(), "error", 1)
    assert sorted(os.listdir(folder)) == ["train", "val"]


def test_a_worker_that_dies_is_an_error_and_no_wait(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(writer, "convert", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    refused(folder, tmp_path / "out", "a worker process died by signal 9", "fewer --workers")


def test_workers_end_when_their_parent_is_killed(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(writer, "convert", slowly(0.01))
    process = begin(folder, tmp_path / "out")
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    assert len(children) >= 1
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    def running(pid):
        with contextlib.suppress(OSError):
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"

    wait_for(lambda: not any(map(running, children)))


def test_an_error_in_the_program_is_shown_whole(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(writer, "convert", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        convert(folder, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == []


def outcome(action):
    """The error that `action` ends with, in a process of its own."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run():
        try:
            action()
        except BaseException as error:
            sender.send((type(error).__name__, str(error)))

    process = FORK.Process(target=run)
    process.start()
    assert receiver.poll(60)
    process.join()
    return receiver.recv()


@pytest.mark.parametrize("limit", [8 << 20, (8 << 20) + 30_000])  # within the images, and within the table behind them
def test_a_file_that_cannot_grow_is_one_line(folder, tmp_path, limit, verbatim):
    end = BetonSource(verbatim / "train.beton")
    end = int((end.offsets + end.lengths).max())

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit if limit == 8 << 20 else end + 5,) * 2)
        make_dataset(folder, tmp_path / "out", Options(), "error", 2)

    kind, message = outcome(limited)
    assert kind == "DataError" and "cannot write" in message and "File too large" in message and "\n" not in message
    assert os.listdir(tmp_path / "out") == []


def test_a_full_disk_is_one_line(folder, small_disk):
    disk = small_disk("64k")
    with pytest.raises(DataError, match="cannot write .*No space left on device.*: make room there") as caught:
        make_dataset(folder, disk / "out", Options(), "error", 2)
    assert "\n" not in str(caught.value) and os.listdir(disk / "out") == []


def test_the_command_in_a_process_of_its_own(folder, tmp_path):
    command = [sys.executable, "-m", "tools.make_dataset", str(folder), str(tmp_path / "out"), "--workers", "2"]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "wrote 36 train and 12 val images" in done.stdout


@pytest.mark.parametrize("options", [{"quality": 0}, {"max_size": 0}, {"jpeg_fraction": 1.5}, {"workers": 0}])
def test_options_out_of_range_are_refused(folder, tmp_path, options):
    with pytest.raises(SystemExit, match="error: --.* it must be from . to "):
        main(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_lock_is_gone_after_a_conversion(verbatim):
    folder = os.open(verbatim, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)
