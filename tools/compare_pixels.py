"""How far each executor's pixels are from a float reference, as a Markdown table.

    python -m tools.compare_pixels DATA --images 1024

The reference: the whole image by Pillow (libjpeg-turbo, accurate transform), the plan's box resized by PyTorch in
float32, antialiased bilinear. Errors are |pixel - reference| over all pixels, in steps of 1/255.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor

from dcd.engine.command_line import parse
from pipelines.loader import MEAN, STD, DataConfig, build_loader
from pipelines.plan import EpochPlan, RandomCrop
from pipelines.sources.errors import DataError
from pipelines.sources.folder import FolderSource
from tools.conversion.images import Options
from tools.make_dataset import make_dataset

ROWS = (
    ("FFCV, exact", "ffcv", True),
    ("FFCV, fast: half size where that is enough", "ffcv", False),
    ("DALI", "dali", True),
    ("torchvision", "torchvision", True),
)


def reference(path: Path, box: tuple[int, int, int, int], flip: bool, size: int) -> Tensor:
    """The reference of one image, its `box` (top, left, height, width): (3, size, size) float32 in [0, 255]."""
    top, left, height, width = box
    with Image.open(path) as file:
        whole = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).float()
    cut = whole[None, :, top : top + height, left : left + width]
    image = F.interpolate(cut, (size, size), mode="bilinear", antialias=True)[0]
    return image.flip(2) if flip else image


def references(folder: Path, config: DataConfig, steps: int) -> Iterator[Tensor]:
    """The references of the first `steps` training batches, (N, 3, S, S)."""
    source = FolderSource(folder / "train")
    plan = EpochPlan(config.seed, 0, source.sizes, config.batch_size, RandomCrop())
    for step in map(plan.step, range(steps)):
        images = zip(step.indices, step.boxes.tolist(), step.flips, strict=True)
        yield torch.stack([reference(source.path(i), box, flip, config.input_size) for i, box, flip in images])


def errors(folder: Path, config: DataConfig, steps: int) -> np.ndarray:
    """|pixel - reference| of the first `steps` batches, flat, in [0, 255]."""
    loader = build_loader(config, "train")
    std, mean = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)
    batches = zip(loader, references(folder, config, steps), strict=False)
    found = [(batch.images * std + mean - wanted).abs().flatten().numpy() for batch, wanted in batches]
    loader.close()
    return np.concatenate(found)


def main(data: tyro.conf.Positional[Path], images: int = 1024, sizes: tuple[int, ...] = (224, 160, 112)) -> None:
    """Compare every executor with the reference on DATA/train.

    Args:
        data: a folder with train/CLASS/*.JPEG and val/CLASS/*.JPEG.
        images: how many are compared.
        sizes: sides of the resized images in pixels.
    """
    batch_size = min(64, images)
    try:
        with tempfile.TemporaryDirectory(dir=data.parent) as beton:
            make_dataset(data, Path(beton), Options("verbatim"), "error", 2)
            print("| executor | pixels | mean | 99.9th percentile | highest |\n|---|---|---|---|---|")
            for name, backend, exact in ROWS:
                for size in sizes:
                    config = DataConfig(Path(beton), backend, batch_size, 2, input_size=size, exact_decode=exact)
                    found = errors(data, config, images // batch_size)
                    high = np.percentile(found, 99.9)
                    print(f"| {name} | {size} | {found.mean():.3f} | {high:.2f} | {found.max():.1f} |")
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    parse(main)
