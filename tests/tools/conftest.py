"""A small ImageNet of 3 classes, 36 train and 12 val images, in each of the forms that people have it in."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WNIDS = ("n01440764", "n02119789", "n15075141")


def jpeg(seed: int, size=(64, 64), mode="RGB", **options) -> bytes:
    """A JPEG of smooth noise; (width, height)."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def small_disk(tmp_path):
    """`small_disk("64k")`: an empty disk of that size, mounted until the test ends."""
    disk = tmp_path / "disk"

    def mount(size: str) -> Path:
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True)
        if done.returncode:
            pytest.skip("may not mount a small disk")
        return disk

    yield mount
    if disk.is_mount():
        subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="session")
def images() -> dict[str, list[tuple[str, str, bytes]]]:
    """(class, file name, bytes) of each image in the dataset's order. The numbers sort otherwise than as numbers."""
    sizes = [(64, 64), (80, 60), (48, 72)]
    numbers = sorted((1, 7, 10, 100, 1000, 1001, 11, 110, 2, 20, 200, 3), key=lambda number: f"{number}.")
    train = [
        (wnid, f"{wnid}_{number}.JPEG", jpeg(1000 * label + number, sizes[label]))
        for label, wnid in enumerate(WNIDS)
        for number in numbers
    ]
    val = [
        (WNIDS[number * 7 % 3], f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(5000 + number, sizes[number % 3]))
        for number in range(1, 13)
    ]
    return {"train": train, "val": sorted(val)}


@pytest.fixture(scope="session")
def folder(images, tmp_path_factory) -> Path:
    """The images as an ImageFolder."""
    root = tmp_path_factory.mktemp("folder")
    for split, members in images.items():
        for wnid, name, data in members:
            (root / split / wnid).mkdir(parents=True, exist_ok=True)
            (root / split / wnid / name).write_bytes(data)
    return root


@pytest.fixture(scope="session")
def kaggle(images, tmp_path_factory) -> Path:
    """The images as Kaggle has them."""
    root = tmp_path_factory.mktemp("kaggle")
    data = root / "ILSVRC/Data/CLS-LOC"
    for wnid, name, content in images["train"]:
        (data / "train" / wnid).mkdir(parents=True, exist_ok=True)
        (data / "train" / wnid / name).write_bytes(content)
    (data / "val").mkdir()
    (data / "test").mkdir()
    lines = ["ImageId,PredictionString"]
    for wnid, name, content in images["val"]:
        (data / "val" / name).write_bytes(content)
        lines.append(f"{Path(name).stem},{wnid} 1 2 30 40 {wnid} 5 6 50 60")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(scope="session")
def tars(images, tmp_path_factory) -> Path:
    """The images as the official archives, classes and members in no order."""
    root = tmp_path_factory.mktemp("tars")
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid in WNIDS[::-1]:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for _, name, data in [image for image in images["train"] if image[0] == wnid][::-1]:
                    add(inner, name, data)
            add(outer, f"{wnid}.tar", buffer.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for _, name, data in sorted(images["val"], key=lambda image: image[1]):
            add(archive, name, data)
    write_devkit(root, [wnid for wnid, _, _ in sorted(images["val"], key=lambda image: image[1])])
    return root


def write_devkit(root: Path, val: list[str]) -> None:
    """`val`: the classes of the validation images in the order of their numbers."""
    from scipy.io import savemat

    ids = {WNIDS[0]: 2, WNIDS[1]: 3, WNIDS[2]: 1}
    synsets = np.zeros((4, 1), [(name, object) for name in ("ILSVRC2012_ID", "WNID", "words", "num_children")])
    for row, (wnid, number) in enumerate(ids.items()):
        synsets[row, 0] = (float(number), wnid, f"words of {wnid}", 0.0)
    synsets[3, 0] = (4.0, "n00001740", "entity", 3.0)  # not a leaf, so no class
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        truth = "".join(f"{ids[wnid]}\n" for wnid in val)
        add(archive, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", truth.encode())


@pytest.fixture(scope="session")
def shards(images, tmp_path_factory) -> Path:
    """The images as Hugging Face's shards: shuffled rows, longer names, row groups of 5."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(root / "data", images)
    return root


@pytest.fixture(scope="session")
def make_shards():
    """`write_shards`, for a test's own."""
    return write_shards


@pytest.fixture(scope="session")
def make_devkit():
    """`write_devkit`, for a test's own."""
    return write_devkit


def write_shards(folder: Path, images, names=None, group=5, with_paths=True, label_of=WNIDS.index) -> None:
    """`names`: of the classes in the schema. `label_of(wnid)`: the label stored for a class."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True)
    for split, members in (("train", images["train"]), ("validation", images["val"]), ("test", images["val"][:2])):
        order = np.random.default_rng(0).permutation(len(members))
        for number, part in enumerate(np.array_split(order, 2)):
            rows = [members[i] for i in part]
            image = [
                {"bytes": data, "path": name.replace(".", f"_{wnid}.") if with_paths else None}
                for wnid, name, data in rows
            ]
            labels = [-1 if split == "test" else label_of(wnid) for wnid, _, _ in rows]
            kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
            table = pa.table({"image": pa.array(image, kind), "label": pa.array(labels, pa.int64())})
            features = {"image": {"_type": "Image"}, "label": {"names": list(names or WNIDS), "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
            parquet.write_table(table, folder / f"{split}-{number:05d}-of-00002.parquet", row_group_size=group)
