"""What is decoded on a GPU against what the CPU decodes; and batches of the CPU that go to a GPU."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.batch import Place
from pipelines.config import AugmentationConfig, DataConfig
from pipelines.executors.dali_executor import is_installed
from pipelines.executors.torchvision_executor import TorchvisionExecutor
from pipelines.loader import Loader
from pipelines.sources.beton import BetonSource
from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource
from tests.pipelines.helpers import Inverted, converted, pixels_of, write_photos

pytestmark = pytest.mark.gpu
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """The twelve photographs in a folder, without the .beton files that need FFCV."""
    pytest.importorskip("sklearn", reason="needs scikit-learn")
    root = tmp_path_factory.mktemp("photographs")
    write_photos(root)
    return root


@pytest.fixture
def copied(photographs, tmp_path) -> Path:
    """The photographs, to be changed."""
    return shutil.copytree(photographs, tmp_path / "copy")


@pytest.fixture(params=["torchvision", "dali", "dali by whole images"])
def decoder(request) -> dict:
    """The options of a loader that decodes on a GPU."""
    backend, _, whole = request.param.partition(" by ")
    if backend == "dali" and not is_installed():
        pytest.skip("needs NVIDIA DALI")
    return {"backend": backend, "dali_full_decode": 0.5 if whole else None}


def agree(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Images of a GPU's decoder are those of the CPU's.

    The bounds are expectations, not measured: nvJPEG repeats the pixels of the halved colours, where libjpeg-turbo
    interpolates them. libjpeg-turbo told to repeat them, too, was off by 0.76 on average and by 11 in the 99.9th
    percentile at 160 pixels in training, by 0.24 and 3 at 64 in evaluation.
    """
    errors = (pixels_of(found.cpu()) - pixels_of(wanted)).abs()
    assert errors.mean() <= 1 and np.percentile(errors, 99.9) <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("split", ["train", "val"])
def test_the_batches_of_a_gpu_are_those_of_the_cpu(photographs, build, decoder, split, dtype, monkeypatch):
    config = DataConfig(photographs, "torchvision", batch_size=5, workers=0, input_size=160, eval_size=64)
    wanted = list(build(config, split))
    monkeypatch.setattr(FolderSource, "decode", lambda *_: pytest.fail("the GPU left an image to the CPU"))
    found = list(build(replace(config, **decoder, workers=2), split, Place(device=GPU, dtype=dtype)))
    for batch, expected in zip(found, wanted, strict=True):
        assert torch.equal(batch.indices, expected.indices) and torch.equal(batch.labels.cpu(), expected.labels)
        assert batch.images.device == batch.labels.device == GPU and batch.images.dtype == dtype
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
    agree(torch.cat([batch.images for batch in found]), torch.cat([batch.images for batch in wanted]))


def test_batches_under_load_are_those_of_the_cpu(photographs, build, decoder):
    """Twenty-one of them, while the GPU computes on another stream and still reads the batch before on this one."""
    config = DataConfig(photographs, "torchvision", batch_size=4, workers=0, input_size=160)
    cpus, gpus = build(config, "train"), build(replace(config, **decoder, workers=2), "train", Place(device=GPU))
    other, matrix = torch.cuda.Stream(GPU), torch.randn(4096, 4096, Place(device=GPU))
    other.wait_stream(torch.cuda.current_stream(GPU))
    sums, kept, wanted = [], [], []
    for epoch in range(7):
        for loader in (cpus, gpus):
            loader.set_epoch(epoch)
        for batch, expected in zip(gpus, cpus, strict=True):
            with torch.cuda.stream(other):
                for _ in range(8):
                    matrix @ matrix
            matrix @ matrix  # the batch is read after this, when it has long been given back
            kept.append(batch.images.clone())
            sums.append(batch.images.double().sum())
            wanted.append(expected.images)
            del batch
    assert len(kept) == 21
    for images, total, expected in zip(kept, sums, wanted, strict=True):
        agree(images, expected)
        assert total.item() == pytest.approx(images.double().sum().item(), rel=1e-9)


@pytest.mark.parametrize("damage", ["truncated", "no image"])
def test_a_damaged_file_is_named(copied, build, decoder, damage):
    loader = build(DataConfig(copied, **decoder, batch_size=4, workers=2, eval_size=32), "val", Place(device=GPU))
    bad = copied / "val" / "flower" / "2.JPEG"
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2] if damage == "truncated" else b"x")
    with pytest.raises(DataError) as error:
        list(loader)
    assert str(bad) in str(error.value) and "\n" not in str(error.value)
    assert loader.state_dict()["step"] <= 2  # the image is number 8, in the third batch


@pytest.mark.parametrize("form", ["CMYK", "PNG"])
def test_what_the_gpu_does_not_decode_comes_out_all_the_same(copied, build, decoder, form):
    odd = copied / "val" / "flower" / "2.JPEG"
    with Image.open(odd) as file:
        image = file.convert("CMYK") if form == "CMYK" else file.copy()
    image.save(odd, "PNG" if form == "PNG" else "JPEG")
    config = DataConfig(copied, "torchvision", batch_size=12, workers=0, eval_size=64)
    (wanted,), (found,) = build(config, "val"), build(replace(config, **decoder, workers=2), "val", Place(device=GPU))
    agree(found.images, wanted.images)
    agree(found.images[8], wanted.images[8])


def batches_of_two_epochs(executor, source, device, augmentations=()) -> list[torch.Tensor]:
    """Pixels in [0, 255]. Each batch is freed before the GPU, which has other work first, has read it."""
    config, place = DataConfig(batch_size=4, input_size=64), Place(device=device)
    loader = Loader(source, executor, True, config, AugmentationConfig(), place, 0, augmentations)
    kept = []
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        for batch in loader:
            work = torch.ones(4096 if batch.images.is_cuda else 1, 4096, device=batch.images.device)
            for _ in range(4):
                work @ work.t()
            kept.append((batch.images.clone(), batch.labels.clone()))
            del batch
    loader.close()
    return [torch.cat([pixels_of(images.cpu()).flatten(), labels.cpu()]) for images, labels in kept]


@pytest.mark.parametrize("augmentations", [(), (Inverted(),)])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_torchvision_decodes_on_the_cpu_arrives_as_it_is(photographs, workers, augmentations):
    source = FolderSource(photographs / "train")
    wanted, found = (
        batches_of_two_epochs(TorchvisionExecutor(source, device, workers), source, device, augmentations)
        for device in (CPU, GPU)
    )
    for batch, expected in zip(found, wanted, strict=True):
        assert torch.equal(batch.round(), expected.round())  # bytes, augmented and normalised on the device


@pytest.mark.parametrize("workers", [1, 2])
def test_what_ffcv_decodes_on_the_cpu_arrives_as_bytes(photographs, tmp_path, workers):
    pytest.importorskip("ffcv", reason="needs FFCV")
    from pipelines.executors.ffcv_executor import FfcvExecutor

    source = BetonSource(converted(photographs, tmp_path / "beton") / "train.beton")
    wanted, found = (
        batches_of_two_epochs(FfcvExecutor(source, device, workers, exact=True), source, device)
        for device in (CPU, GPU)
    )
    for batch, expected in zip(found, wanted, strict=True):
        assert (batch - expected).abs().max() < 0.501  # on a CPU they stay what the resize makes of them
