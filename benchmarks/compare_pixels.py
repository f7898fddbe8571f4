"""Compare each executor's pixels with a float reference. Markdown tables by executor and by chroma sampling.

    python -m benchmarks.compare_pixels DATA --images 1024
    python -m benchmarks.compare_pixels DATA --backends dali torchvision --device cuda

The reference: Pillow decodes the whole image (libjpeg-turbo, accurate inverse DCT), and PyTorch resizes the plan's box
in float32, antialiased bilinear. Errors are |pixel - reference| over all pixels, in steps of 1/255. For the second
table whole images are encoded again with each sampling, and decoded by `native.render` at 1/2, 1/4 and 1/8.
"""

import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.programs import run_program
from pipelines import native
from pipelines.batch import Place
from pipelines.build import build_loader
from pipelines.config import Backend, DataConfig
from pipelines.imagenet import MEAN, STD
from pipelines.plan import EpochPlan, RandomCrop
from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource
from tools.profiling.machine import describe_machine
from tools.profiling.report import markdown_table, write_report
from training.command_line import parse

Way = tuple[str, Backend, dict[str, Any]]  # its name, and options
ROWS: tuple[Way, ...] = (
    ("FFCV, exact", "ffcv", {"exact_decode": True}),
    ("FFCV, fast: half size where that is enough", "ffcv", {}),
    ("DALI", "dali", {}),
    ("torchvision", "torchvision", {}),
)
ROWS_ON_A_GPU: tuple[Way, ...] = (  # whole images, decoded by its multiprocessors or by its JPEG decoder
    ("DALI, whole images, hardware share 0", "dali", {"dali_full_decode": 0.0}),
    ("DALI, whole images, hardware share 1", "dali", {"dali_full_decode": 1.0}),
)
HEADS = ("executor", "pixels", "mean", "99.9th percentile", "highest")
SAMPLINGS = ("4:4:4", "4:2:0", "4:2:2", "4:4:0", "4:1:1")
SCALES = (2, 4, 8)


def reference(path: Path | IO[bytes], box: tuple[int, int, int, int], flip: bool, size: int) -> Tensor:
    """The reference of a `box` (top, left, height, width) of an image: (3, size, size) float32 in [0, 255]."""
    top, left, height, width = box
    with Image.open(path) as file:
        whole = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).float()
    cut = whole[None, :, top : top + height, left : left + width]
    image = F.interpolate(cut, (size, size), mode="bilinear", antialias=True)[0]
    return image.flip(2) if flip else image


def references(folder: Path, config: DataConfig, steps: int) -> Iterator[Tensor]:
    """The references of the first `steps` training batches, (N, 3, S, S)."""
    source = FolderSource(folder / "train")
    plan = EpochPlan(0, 0, source.sizes, config.batch_size, RandomCrop(), shuffle=True, drop_last=True)
    for step in map(plan.step, range(steps)):
        # pyrefly: ignore[bad-argument-type]: it takes what tolist() gives for a number
        images = zip(step.indices, step.boxes.tolist(), step.flips, strict=True)
        yield torch.stack([reference(source.path(i), box, flip, config.input_size) for i, box, flip in images])


def errors(folder: Path, config: DataConfig, steps: int, device: str) -> np.ndarray:
    """|pixel - reference| of the first `steps` batches, flat, in [0, 255]."""
    loader = build_loader(config, "train", Place(device=torch.device(device)))
    std, mean = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)
    batches = zip(loader, references(folder, config, steps), strict=False)
    found = [(batch.images.cpu() * std + mean - wanted).abs().flatten().numpy() for batch, wanted in batches]
    loader.close()
    return np.concatenate(found)


def random_colours(seed: int) -> np.ndarray:
    """(512, 512, 3) uint8: another colour every 16 pixels, smooth between them."""
    coarse = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((512, 512), Image.Resampling.BICUBIC))


def scaled_errors(pixels: np.ndarray, sampling: str, scale: int) -> np.ndarray:
    """|pixel - reference| of `pixels` (H, W, 3) as a JPEG, decoded at 1 / `scale` of its size; flat, in [0, 255]."""
    import cv2

    factor = getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling.replace(':', '')}")
    options = [cv2.IMWRITE_JPEG_QUALITY, 94, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, factor]
    jpeg = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), options)[1]
    size, jobs = pixels.shape[:2], np.zeros(1, native.JOB)
    jobs["data"], jobs["size"], jobs["image_size"], jobs["box"] = jpeg.ctypes.data, jpeg.nbytes, size, (0, 0, *size)
    images = np.empty((1, min(size) // scale, min(size) // scale, 3), np.float32)
    native.render(jobs, images, 1, exact=False)
    wanted = reference(io.BytesIO(jpeg.data), (0, 0, *size), False, images.shape[1])
    return np.abs(images[0] - wanted.permute(1, 2, 0).numpy()).ravel()


def compare_samplings(folder: Path, images: int) -> str:
    """The table by sampling for the first `images` of `folder` and as many images of random colours."""
    source = FolderSource(folder)
    photos = [source.decode(i).permute(1, 2, 0).numpy() for i in range(min(images, len(source)))]
    colours = [random_colours(seed) for seed in range(len(photos))]
    heads = [f"1/{scale} {figure}" for scale in SCALES for figure in ("mean", "99.9th percentile")]
    rows = []
    for name, all_pixels in (("DATA/train", photos), ("random colours", colours)):
        for sampling in SAMPLINGS:
            found = [np.concatenate([scaled_errors(pixels, sampling, s) for pixels in all_pixels]) for s in SCALES]
            rows.append(
                (name, sampling, *(cell for each in found for cell in (each.mean(), np.percentile(each, 99.9))))
            )
    return markdown_table(("images", "sampling", *heads), rows)


def main(
    data: Path,
    images: int = 1024,
    sizes: tuple[int, ...] = (224, 160, 112),
    backends: tuple[Backend, ...] = ("ffcv", "dali", "torchvision"),
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path | None = None,
) -> None:
    """Compare every executor with the reference on DATA/train, and FFCV's fast decoding by chroma sampling.

    Args:
        data: a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG.
        images: how many are compared; a quarter of them in the table by sampling.
        sizes: sides of the resized images in pixels.
        backends: those whose executors are compared; without ffcv there is no table by sampling.
        device: where the batches end, and where DALI and torchvision decode.
        out: write the report to OUT.md and OUT.json.
    """
    batch_size, rows, by_ffcv = min(64, images), [], "ffcv" in backends
    try:
        with tempfile.TemporaryDirectory(dir=data.parent) as beton:
            if by_ffcv:
                run_program("tools.make_dataset", data, beton, "--workers", 2)
            for name, backend, options in ROWS + ROWS_ON_A_GPU if device == "cuda" else ROWS:
                for size in sizes if backend in backends else ():
                    root = Path(beton) if backend == "ffcv" else data
                    config = DataConfig(root, backend, batch_size, 2, input_size=size, **options)
                    found = errors(data, config, images // batch_size, device)
                    cells = (found.mean(), np.percentile(found, 99.9), found.max())
                    rows.append((name, size, *map(float, cells)))
        sections = [markdown_table(HEADS, rows), *([compare_samplings(data / "train", images // 4)] if by_ffcv else [])]
        write_report(out, describe_machine(torch.device(device)), sections, heads=HEADS, rows=rows)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    parse(main)
