"""Write a small real dataset in ImageNet's folder layout: scikit-learn's handwritten digits.

    python -m tools.make_sample OUT        ->  OUT/train/CLASS/*.JPEG (1,437), OUT/val/CLASS/*.JPEG (360)

1,797 scans of 8×8 pixels (E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998), enlarged
to 64×64 and stored as RGB JPEG. Every fifth scan goes to val, so train and val have the same writers.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from training.command_line import parse

SIZE = 64
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def make_sample(out: Path) -> None:
    """Write the sample below `out`; an existing sample is kept.

    Raises:
        FileExistsError: `out` holds something else.
    """
    if (out / "train").is_dir() and (out / "val").is_dir():
        print(f"{out} is there already")
        return
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no sample: name another folder or empty it")
    temporary = out.with_name(f"{out.name}.tmp{os.getpid()}")  # renamed when it is complete
    digits: Any = load_digits()
    for i, (scan, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        folder = temporary / ("val" if i % 5 == 0 else "train") / f"{label}_{NAMES[label]}"
        folder.mkdir(parents=True, exist_ok=True)
        grey = Image.fromarray(np.rint(scan * 255 / 16).astype(np.uint8))  # ink from 0 to 16
        image = grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
        image.save(folder / f"digit_{i:04d}.JPEG", quality=95)
    if out.exists():
        out.rmdir()
    temporary.rename(out)
    print(f"wrote {len(digits.images)} images to {out}")


def main(out: Path) -> None:
    """Write the sample dataset below OUT."""
    try:
        make_sample(out)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    parse(main)
