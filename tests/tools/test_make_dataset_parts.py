"""A dataset in parts: the same images as in one piece, whoever converts them, and no dataset until all are there."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipelines.sources.beton import BetonSource
from pipelines.sources.beton_shards import BetonShards, open_betons
from pipelines.sources.errors import DataError
from tests.tools.test_make_dataset import content as whole_content
from tests.tools.test_make_dataset import load_with_stock_ffcv, run_main, slowly, wait_for
from tools.conversion import writer
from tools.conversion.images import Options
from tools.conversion.inputs import open_source
from tools.conversion.join import join_parts
from tools.conversion.parts import Part, fingerprint
from tools.make_dataset import main, make_dataset, make_parts

FORK = multiprocessing.get_context("fork")


def parts_of(count):
    return [Part(number, count) for number in range(count)]


def convert(src, out, count, on_bad="error", workers=1, only=None, **options):
    """All parts, or those of the numbers in `only`."""
    parts = [Part(number, count) for number in (range(count) if only is None else only)]
    make_parts(src, out, Options(**options), on_bad, workers, parts)


def content(out, split):
    """(labels, sizes, bytes of each image) of a split in shards."""
    source = open_betons(out, split)
    assert isinstance(source, BetonShards)
    return source.labels.tolist(), source.sizes.tolist(), [source.read(i).tobytes() for i in np.arange(len(source))]


def files_of(out):
    """{name: what changes when a file is written again}."""
    stats = {path.name: path.stat() for path in out.iterdir() if path.is_file()}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def expected_files(count):
    """All of a finished set."""
    shards = [f"{split}-{number:05d}-of-{count:05d}" for split in ("train", "val") for number in range(count)]
    return sorted(["dataset.json", *(f"{shard}{end}" for shard in shards for end in (".beton", ".checksums.npy"))])


def join_refused(src, out, *words):
    before = files_of(out)
    with pytest.raises(DataError) as error:
        join_parts(src, out, "error")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert files_of(out) == before  # and so no dataset.json


@pytest.fixture(scope="module")
def three(folder, tmp_path_factory):
    """All three parts, not joined."""
    out = tmp_path_factory.mktemp("parts") / "out"
    for number in range(3):
        convert(folder, out, 3, only=[number])
    return out


@pytest.fixture
def copy(three, tmp_path):
    shutil.copytree(three, tmp_path / "copy")
    return tmp_path / "copy"


# ----------------------------------------------------------------------------------------------------- the same images


@pytest.mark.parametrize("form", ["folder", "tars", "shards"])
def test_parts_hold_the_images_of_one_file_in_its_order(request, tmp_path, form):
    src, options = request.getfixturevalue(form), {"mode": "reencode", "max_size": 60, "jpeg_fraction": 0.3}
    make_dataset(src, tmp_path / "whole", Options(**options), "error", 1)
    for count in (1, 3, 7) if form == "folder" else (3,):
        out = tmp_path / str(count)
        convert(src, out, count, **options)
        assert sorted(os.listdir(out)) == expected_files(count)
        for split in ("train", "val"):
            assert content(out, split) == whole_content(tmp_path / "whole", split)
            sizes = [len(BetonSource(out / f"{part.stem(split)}.beton")) for part in parts_of(count)]
            assert max(sizes) - min(sizes) <= 1
        whole = json.loads((tmp_path / "whole" / "dataset.json").read_text())
        found = json.loads((out / "dataset.json").read_text())
        assert found["options"] == {**whole["options"], "shards": count}
        assert all(found[key] == whole[key] for key in ("format", "classes", "source", "versions"))


def test_one_part_is_read_and_no_other(folder, tars):
    for src in (folder, tars):
        whole = open_source(src).splits["train"]
        part = Part(1, 3).of(open_source(src)).splits["train"]
        assert part.first == 12 and part.name(0) == whole.name(12) and len(part.labels) == 12
        assert sorted(index for task in part.reader.tasks for index in task.tolist()) == list(range(12, 24))


@pytest.fixture
def mixed(folder, tmp_path):
    """A copy of the images, five of them bad: four of train, in the first and the last third, one of val."""
    src = tmp_path / "src"
    shutil.copytree(folder, src)
    files = sorted((src / "train").rglob("*.JPEG"))
    bad = [files[0], files[5], files[11], files[30], sorted((src / "val").rglob("*.JPEG"))[1]]
    for file in bad:
        file.write_bytes(b"text")
    return src, [str(file.relative_to(src)) for file in bad]


def test_skip_leaves_the_images_of_one_file(mixed, tmp_path):
    src, bad = mixed
    options = {"mode": "reencode", "jpeg_fraction": 0.5}
    make_dataset(src, tmp_path / "whole", Options(**options), "skip", 2)
    for count in (1, 3, 7):
        convert(src, tmp_path / str(count), count, "skip", **options)
        splits = json.loads((tmp_path / str(count) / "dataset.json").read_text())["splits"]
        for split, images in (("train", 32), ("val", 11)):
            assert content(tmp_path / str(count), split) == whole_content(tmp_path / "whole", split)
            skipped = [image["name"] for shard in splits[split]["shards"] for image in shard["skipped"]]
            assert skipped == [name for name in bad if name.startswith(split)]
            assert splits[split]["images"] == images


def test_a_bad_image_fails_its_part_alone(mixed, folder, tmp_path, capsys):
    src, bad = mixed
    out = tmp_path / "out"
    with pytest.raises(DataError, match="^5 images do not decode: .* --on-bad skip$"):
        convert(src, out, 3)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[1] for line in lines if line.startswith("bad image: ")] == [*bad[:3], bad[4], bad[3]]
    assert [line for line in lines if line.startswith("part")] == ["part 0/3 is not written", "part 2/3 is not written"]
    before = files_of(out)
    assert sorted(before) == [
        "part-00001-of-00003.json",
        *(f"{split}-00001-of-00003{end}" for split in ("train", "val") for end in (".beton", ".checksums.npy")),
    ]
    join_refused(src, out, "missing: 0/3, 2/3;", "--only K/3")
    for name in bad:
        shutil.copy(folder / name, src / name)
    convert(src, out, 3)
    after = files_of(out)
    assert all(after[name] == found for name, found in before.items() if name in after)
    assert len(content(out, "train")[0]) == 36


def test_parts_without_bad_images_serve_those_who_skip_and_not_the_other_way_round(mixed, tmp_path):
    src, _ = mixed
    out = tmp_path / "out"
    convert(src, out, 3, only=[1])
    convert(src, out, 3, "skip", only=[0])
    with pytest.raises(DataError, match="part 0/3 in .* leaves out 4 images: use --on-bad skip, or remove "):
        convert(src, out, 3)
    convert(src, out, 3, "skip")
    options = json.loads((out / "dataset.json").read_text())["options"]
    assert options == {"mode": "verbatim", "on_bad": "skip", "shards": 3}
    convert(src, out, 3, "skip")  # is there already


def test_stock_ffcv_reads_every_shard(three, tmp_path):
    shards = [three / f"{part.stem('train')}.beton" for part in parts_of(3)]

    def load_all():
        for shard in shards:
            load_with_stock_ffcv(shard, tmp_path / f"{shard.stem}.npz")

    process = FORK.Process(target=load_all)
    process.start()
    process.join(100)
    assert process.exitcode == 0
    for number, shard in enumerate(shards):
        with np.load(tmp_path / f"{shard.stem}.npz") as found:
            assert found["labels"].tolist() == [number] * 12 and found["pixels"].any()


# ------------------------------------------------------------------------------------------------------ many processes


def start(errors, *arguments, **options):
    process = FORK.Process(target=run_main, args=(errors, *arguments), kwargs=options)
    process.start()
    return process


def test_processes_share_the_parts_and_a_join_ends_them(folder, tmp_path):
    out = tmp_path / "out"
    processes = [start(tmp_path / f"{number}", folder, out, only=f"{number}/3", workers=1) for number in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tools.make_dataset", str(folder), str(out), "--join"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert "joined 3 parts: 36 train and 12 val images" in done.stdout
    assert sorted(os.listdir(out)) == expected_files(3)
    before = files_of(out)
    convert(folder, out, 3)
    convert(folder, out, 3, only=[2])
    join_parts(folder, out, "error")
    assert files_of(out) == before


def test_the_same_part_is_not_converted_twice_at_once_and_another_is(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(writer, "convert", slowly(0.1))
    out, errors = tmp_path / "out", tmp_path / "errors"
    process = start(errors, folder, out, only="1/3", workers=1)
    wait_for((out / ".partial" / "part-00001-of-00003" / "train-00001-of-00003.beton").exists)
    monkeypatch.undo()
    with pytest.raises(DataError, match="another conversion is writing to .*part-00001-of-00003.lock: wait for it"):
        convert(folder, out, 3, only=[1])
    with pytest.raises(DataError, match="another conversion is writing to .*out: wait for it"):
        make_dataset(folder, out, Options(), "error", 1)
    join_refused(folder, out, "another conversion is writing to ")
    convert(folder, out, 3, only=[0])
    assert process.is_alive()
    process.join(60)
    assert process.exitcode == 0
    convert(folder, out, 3, only=[1])  # is there already, and its lock is free


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_conversion_goes_on_with_what_is_missing(monkeypatch, folder, three, tmp_path, number):
    out, errors = tmp_path / "out", tmp_path / "errors"
    with monkeypatch.context() as patch:
        patch.setattr(writer, "convert", slowly(0.05))
        process = start(errors, folder, out, shards=3, workers=2)
        wait_for((out / ".partial" / "part-00001-of-00003" / "train-00001-of-00003.beton").exists)
        os.kill(process.pid, number)
        process.join(20)
    if number == signal.SIGTERM:
        assert errors.read_text().startswith("error: stopped: the parts that are finished stay; the same command goes ")
    before = files_of(out)
    assert sorted(before) == sorted(name for name in os.listdir(three) if "00000-of" in name)
    convert(folder, out, 3)
    after = files_of(out)
    assert sorted(os.listdir(out)) == expected_files(3)
    assert all(after[name] == found for name, found in before.items() if name in after)
    for name in after:
        if name != "dataset.json":
            assert (out / name).read_bytes() == (three / name).read_bytes()


def test_a_part_that_was_interrupted_while_it_was_renamed_is_finished(folder, copy, capsys):
    partial = copy / ".partial" / "part-00001-of-00003"
    partial.mkdir()
    before = files_of(copy)
    for name in ("val-00001-of-00003.beton", "val-00001-of-00003.checksums.npy", "part-00001-of-00003.json"):
        (copy / name).rename(partial / name)
    convert(folder, copy, 3, only=[1])
    assert "part 1/3 is there already" in capsys.readouterr().out
    assert files_of(copy) == before


def test_finished_parts_stay_when_the_disk_is_full(folder, small_disk):
    disk = small_disk("200k")
    with pytest.raises(DataError, match="cannot write .*No space left on device.*: make room there") as error:
        convert(folder, disk / "out", 7)
    assert "\n" not in str(error.value)
    found = sorted(os.listdir(disk / "out"))
    assert "part-00000-of-00007.json" in found and "dataset.json" not in found
    assert not any((disk / "out" / ".partial").glob("*/"))
    subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
    before = files_of(disk / "out")
    convert(folder, disk / "out", 7)
    after = files_of(disk / "out")
    assert all(after[name] == found for name, found in before.items() if name in after)


# -------------------------------------------------------------------------------------------------------- what is wrong


def test_a_missing_part_is_named(folder, copy):
    (copy / "part-00001-of-00003.json").unlink()
    join_refused(folder, copy, "is no dataset yet; missing: 1/3; convert these with --only K/3")
    (copy / "part-00002-of-00003.json").unlink()
    join_refused(folder, copy, "missing: 1/3, 2/3;")
    (copy / "part-00000-of-00003.json").unlink()
    join_refused(folder, copy, "holds no parts: convert them with --only K/N first")


@pytest.mark.parametrize("name", ["train-00001-of-00003.beton", "val-00001-of-00003.checksums.npy"])
@pytest.mark.parametrize("damage", ["gone", "short", "changed"])
def test_a_damaged_part_is_named_and_converted_again(folder, copy, three, capsys, name, damage):
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    if damage == "gone":
        (copy / name).unlink()
    else:
        (copy / name).write_bytes(data[:-24] if damage == "short" else data)
    record = "part-00001-of-00003.json or the checksums that it names do not read"
    named = record if (name.endswith("npy"), damage) == (True, "short") else name
    join_refused(folder, copy, "part 1/3: ", named, "convert these with --only K/3")
    before = files_of(copy)
    convert(folder, copy, 3, only=[1])
    assert "part 1/3 is converted again: " in capsys.readouterr().err
    after = files_of(copy)
    assert all(after[other] == found for other, found in before.items() if "00001-of" not in other)
    assert (copy / name).read_bytes() == (three / name).read_bytes()
    join_parts(folder, copy, "error")


def test_a_record_that_does_not_read_is_named(folder, copy):
    record = copy / "part-00001-of-00003.json"
    whole = record.read_text()
    changed = [whole.replace(f'"{word}"', '"x"') for word in ("skipped", "images", "versions", "listing", "on_bad")]
    other = (copy / "part-00002-of-00003.json").read_text()
    for text in ("", "{}", "[]", "3", "[" * 100_000, '{"splits": []}', other, *changed):
        record.write_text(text)
        join_refused(folder, copy, "part 1/3: ", "part-00001-of-00003.json does not read", "remove *-00001-of-00003.*")
        with pytest.raises(DataError, match="part-00001-of-00003.json does not read"):
            convert(folder, copy, 3, only=[1])


def test_parts_of_other_images_or_options_are_named(folder, copy, tmp_path):
    renamed = tmp_path / "renamed"
    shutil.copytree(folder, renamed)
    next((renamed / "val").rglob("*.JPEG")).rename(renamed / "val" / "n01440764" / "another.JPEG")
    for src, options in ((renamed, {}), (folder, {"mode": "reencode"})):
        other = tmp_path / f"other {len(options)}"
        convert(src, other, 3, only=[2], **options)
        with pytest.raises(DataError, match="holds part 2/3 of other images or by other options .*: remove "):
            convert(src, copy, 3, only=[2], **options)
        for name in files_of(other):
            shutil.copy(other / name, copy / name)
        join_refused(folder, copy, "of other images or by other options than the rest: 2/3 (remove *-00002-of-00003.*)")


def test_a_shard_in_the_place_of_another_is_named(folder, copy):
    """One that is there twice, under two names."""
    shutil.copy(copy / "train-00000-of-00003.beton", copy / "train-00002-of-00003.beton")
    join_refused(folder, copy, "part 2/3: ", "train-00002-of-00003.beton is damaged")


def test_parts_of_two_numbers_are_refused(folder, three, copy, tmp_path):
    with pytest.raises(DataError, match="holds part-00000-of-00003.json: go on with --shards 3, or name another "):
        convert(folder, copy, 7)
    with pytest.raises(DataError, match="holds part-00000-of-00003.json: go on with --shards 3, or name another "):
        make_dataset(folder, copy, Options(), "error", 1)
    convert(folder, tmp_path / "seven", 7, only=[0])
    shutil.copy(tmp_path / "seven" / "part-00000-of-00007.json", copy)
    join_refused(folder, copy, "holds parts of 3 and of 7: remove those of one")
    (copy / "part-00000-of-00007.json").unlink()
    shutil.copy(tmp_path / "seven" / "val-00000-of-00007.beton", copy)
    join_refused(folder, copy, "holds val twice, as 3 shards and as 7 shards")


def test_files_that_are_not_ours_stay(folder, tmp_path):
    for name in ("train-00001-of-00003.beton", "val.beton"):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        (out / name).write_text("mine")
        with pytest.raises(DataError, match=f"holds {name} but no .*: remove it, or name another folder"):
            convert(folder, out, 3)
        assert (out / name).read_text() == "mine"


def test_another_dataset_is_refused(folder, copy):
    join_parts(folder, copy, "error")
    for count, options in ((7, {}), (3, {"mode": "reencode"})):
        with pytest.raises(DataError, match="holds another dataset"):
            convert(folder, copy, count, **options)
    with pytest.raises(DataError, match="holds another dataset"):
        make_dataset(folder, copy, Options(), "error", 1)


def test_the_versions_of_all_machines_are_recorded(folder, copy):
    path = copy / "part-00001-of-00003.json"
    record = json.loads(path.read_text())
    numpy = record["versions"]["numpy"]
    record["versions"]["numpy"] = "0.1"
    path.write_text(json.dumps(record))
    join_parts(folder, copy, "error")
    assert json.loads((copy / "dataset.json").read_text())["versions"]["numpy"] == f"0.1, {numpy}"


def test_a_fingerprint_is_that_of_classes_names_and_labels(folder, tmp_path):
    found = {fingerprint(open_source(folder))}
    assert found == {fingerprint(open_source(shutil.copytree(folder, tmp_path / "same")))}
    for number, change in enumerate(("name", "class", "fewer")):
        src = shutil.copytree(folder, tmp_path / change)
        image = next((src / "train" / "n01440764").iterdir())
        if change == "name":
            image.rename(image.with_name("another.JPEG"))
        elif change == "class":
            for split in ("train", "val"):
                (src / split / "n01440764").rename(src / split / "n01440765")
        else:
            image.unlink()
        found.add(fingerprint(open_source(src)))
        assert len(found) == 2 + number


@pytest.mark.parametrize(
    "options, words",
    [
        ({"shards": 0}, "--shards 0: it must be from 1 to 256"),
        ({"shards": 257}, "--shards 257: it must be from 1 to 256"),
        ({"shards": 13}, "val holds 12 images: they do not fill 13 shards"),
        ({"only": "16/16"}, "--only 16/16: it must be K/N, K from 0 to N - 1"),
        ({"only": "3"}, "--only 3: it must be K/N"),
        ({"only": "-1/3"}, "--only -1/3: it must be K/N"),
        ({"only": "0/257"}, "N at most 256"),
        ({"only": "0/3", "shards": 4}, "--only 0/3 is a part of 3, not of --shards 4"),
        ({"only": "0/3", "join": True}, "--join and --only"),
        ({"join": True}, "convert the parts with --only K/N first"),
    ],
)
def test_options_that_mean_nothing_are_refused(folder, tmp_path, options, words):
    with pytest.raises(SystemExit) as error:
        main(folder, tmp_path / "out", **options)
    assert str(error.value.code).startswith("error: ") and words in error.value.code and "\n" not in error.value.code
