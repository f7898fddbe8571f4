"""Finds out whether DALI can decode a box of a JPEG ("mixed" `image_slice`) on this GPU.

nvImageCodec 0.9.0, which DALI 2.4 needs, is reported to fail at it: with an error on some GPUs, with a segmentation
fault on others (nvImageCodec's issue 55). So it is tried once in a process of its own, and the answer is kept.
"""

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.cache import cache_folder

PACKAGES = ("nvidia-dali-cuda130", "nvidia-nvimgcodec-cu13", "nvidia-dali-cuda120", "nvidia-nvimgcodec-cu12")
LIMIT_S = 90.0  # for the attempt, of which DALI takes seconds to start
TOLERANCE = 8.0  # mean |difference| from the CPU's pixels, of 255; decoders differ by less on smooth images


def why_no_box_decode(device: torch.device) -> str | None:
    """None if boxes can be decoded on this GPU, else the reason why not. The first call takes seconds."""
    driver = Path("/proc/driver/nvidia/version")
    setting = [
        *(f"{package} {_version(package)}" for package in PACKAGES),
        torch.cuda.get_device_name(device),
        driver.read_text() if driver.exists() else "",
    ]
    command = [sys.executable, "-m", "pipelines.executors.dali_probe", str(device.index or 0)]
    return probe(command, setting, LIMIT_S)


def probe(command: list[str], setting: list[str], limit_s: float) -> str | None:
    """None if the command ends well within the time, else what went wrong. The answer is kept for the next call.

    Args:
        setting: what the answer depends on (versions, device, driver): a kept answer is used for the same setting only.
    """
    key = hashlib.sha256("\0".join(setting).encode()).hexdigest()[:16]
    kept = cache_folder() / f"dali-box-{key}.json"
    try:
        return json.loads(kept.read_text())["why_not"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # it was not tried yet, or the file is torn
    try:
        # the command imports our modules, which needs the root of the code, wherever this program was started
        root = Path(__file__).parents[2]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, errors="replace", timeout=limit_s)
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        error = next((line for line in said if "nvImageCodec" in line), said[-1])[:200]
        why_not = f"it ends by signal {-done.returncode}" if done.returncode < 0 else error if done.returncode else None
    except subprocess.TimeoutExpired:
        why_not = f"it takes more than {limit_s:.0f} s"
    kept.parent.mkdir(parents=True, exist_ok=True)
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"why_not": why_not, "setting": setting}, indent=1) + "\n")
    os.replace(temporary, kept)
    if why_not is not None:
        print(
            f"warning: DALI cannot decode a part of an image here ({why_not}): it decodes whole images and cuts them; "
            f"without {kept} this is tried again",
            file=sys.stderr,
        )
    return why_not


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def smooth_jpegs() -> list[NDArray[np.uint8]]:
    """Smooth images of several sizes, with colours at half the resolution (4:2:0), as most JPEGs have them."""
    found = []
    for height, width in ((375, 500), (500, 333), (64, 48), (427, 641)):
        y, x = torch.linspace(0, 3, height)[:, None], torch.linspace(0, 4, width)[None]
        waves = torch.stack([torch.sin(2 * x + y), torch.cos(x - 2 * y), torch.sin(x * y)], dim=-1)
        pixels = (127 + 100 * waves).round().to(torch.uint8).numpy()
        Image.fromarray(pixels).save(jpeg := BytesIO(), "JPEG", quality=90, subsampling="4:2:0")
        found.append(np.frombuffer(jpeg.getvalue(), np.uint8))
    return found


def decode_boxes(encoded: list[NDArray[np.uint8]], boxes: NDArray[np.int32], device_id: int | None) -> list[NDArray]:
    """The boxes (N, 4) of N JPEGs, decoded by DALI on a GPU, or on the CPU where `device_id` is None."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(len(encoded), 2, device_id=device_id)
    with pipeline:
        source = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        start, shape = (fn.external_source(name=name, dtype=types.INT32, ndim=1) for name in ("start", "shape"))
        device = "cpu" if device_id is None else "mixed"
        images = fn.decoders.image_slice(source, start=start, shape=shape, axes=[0, 1], **decoder_options(device))
        pipeline.set_outputs(images)
    pipeline.build()
    pipeline.feed_input("encoded", encoded)
    pipeline.feed_input("start", np.ascontiguousarray(boxes[:, :2]))
    pipeline.feed_input("shape", np.ascontiguousarray(boxes[:, 2:]))
    (output,) = pipeline.run()
    output = output if device_id is None else output.as_cpu()
    return [np.array(output.at(place)) for place in range(len(encoded))]


def decoder_options(device: str) -> dict:
    """Options of all our decoders by DALI. device: "cpu" or "mixed"."""
    from nvidia.dali import types

    options = {
        "device": device,
        "output_type": types.RGB,
        "adjust_orientation": False,  # the plan's sizes are those of the stored image
    }
    # Most JPEGs hold colours at half the resolution. libjpeg-turbo interpolates them; nvJPEG does so only if told to.
    return {**options, "jpeg_fancy_upsampling": True} if device == "mixed" else options


def main(device_id: int | None) -> None:
    """Exit with code 0 if the boxes are decoded and are those of the CPU."""
    from pipelines import native

    encoded = smooth_jpegs()
    for attempt in range(3):  # batches one after another, with other boxes
        sizes = np.array([native.jpeg_size(data) for data in encoded])
        start = (sizes * (0.11 + 0.1 * attempt)).astype(np.int32)
        boxes = np.concatenate([start, (sizes * 0.57).astype(np.int32)], 1).astype(np.int32)
        found = decode_boxes(encoded, boxes, device_id)
        # pyrefly: ignore[bad-argument-type]: it takes what tolist() gives for a number
        for data, image, (top, left, height, width) in zip(encoded, found, boxes.tolist(), strict=True):
            wanted = native.decode_jpeg(data)[top : top + height, left : left + width]
            if image.shape != wanted.shape:
                sys.exit(f"it gives {image.shape} instead of {wanted.shape}")
            difference = np.abs(image.astype(float) - wanted).mean()
            if not difference <= TOLERANCE:
                sys.exit(f"its pixels differ by {difference:.1f} of 255")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else None)
