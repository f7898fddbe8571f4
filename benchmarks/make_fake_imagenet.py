"""Write JPEGs like ImageNet's, to measure loaders without ImageNet.

    python -m benchmarks.make_fake_imagenet OUT --train-images 4096    ->  OUT/train/CLASS/*.JPEG, OUT/val/CLASS/*.JPEG

Sizes are around 500×375 with long tails, a third of them upright, about 110 KB each. The texture is real: crops of
scikit-learn's two sample photographs, enlarged or reduced, with noise like a camera's. The labels mean nothing.
"""

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm

from training.command_line import parse

CLASSES = 10
NOISE = 6.5  # standard deviation of the luminance noise, in [0, 255]; it makes the files as large as ImageNet's
QUALITY = 94


@lru_cache
def photographs() -> list[Image.Image]:
    return [Image.fromarray(photo) for photo in load_sample_images().images]


def random_size(draw: np.random.Generator) -> tuple[int, int]:
    """(width, height): most have 500 pixels on the longer side, as in ImageNet."""
    longer = 500 if draw.random() < 0.7 else int(np.clip(np.exp(draw.normal(np.log(450), 0.55)), 80, 1600))
    shorter = max(60, round(longer * draw.choice([0.75, 0.667, draw.uniform(0.5, 1)], p=[0.6, 0.2, 0.2])))
    return (shorter, longer) if draw.random() < 1 / 3 else (longer, shorter)


def random_image(photos: list[Image.Image], draw: np.random.Generator) -> Image.Image:
    """A crop of a photograph with at least half of its height, at a random size."""
    width, height = random_size(draw)
    photo = photos[draw.integers(len(photos))]
    zoom = min(photo.width / width, photo.height / height) * draw.uniform(0.5, 1)
    left, top = draw.uniform(0, photo.width - width * zoom), draw.uniform(0, photo.height - height * zoom)
    box = (left, top, left + width * zoom, top + height * zoom)
    pixels = np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC, box), np.float32)
    noise = draw.standard_normal((height, width, 1), np.float32) * NOISE
    return Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8))


def write_image(out: Path, split: str, number: int) -> None:
    draw = np.random.default_rng([number, split == "val"])
    folder = out / split / f"n{number % CLASSES:08d}"
    random_image(photographs(), draw).save(folder / f"{split}_{number:08d}.JPEG", quality=QUALITY)


def main(out: Path, train_images: int = 4096, val_images: int = 1024) -> None:
    """Write images like ImageNet's to OUT.

    Args:
        out: a folder that does not hold anything yet.
        train_images: how many are written to OUT/train.
        val_images: how many are written to OUT/val.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise FileExistsError(f"{out} is not empty: name another folder or empty it")
        temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")  # renamed when it is complete
        with ProcessPoolExecutor() as pool:
            for split, count in {"train": train_images, "val": val_images}.items():
                for number in range(CLASSES):
                    (temporary / split / f"n{number:08d}").mkdir(parents=True)
                work = pool.map(partial(write_image, temporary, split), range(count), chunksize=32)
                list(tqdm(work, split, count, unit="image"))
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    parse(main)
