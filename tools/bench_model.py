"""Rates of every DCD model and its static twin on a resident batch: training, inference, inference folded.

    python -m tools.bench_model                       every pair, on the GPU where there is one
    python -m tools.bench_model --models resnet50 --batch-size 32 --json-file out.json

The two of a pair take turns, step by step, so that whatever else the machine does falls on both; a rate is the median
of its steps, a ratio the median of the ratios of neighbouring steps.
"""

import gc
import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import dcd
from tools.profiling.steps import inference_step, seconds_in_turns, train_step
from training.command_line import parse
from training.cpu_memory import keep_freed_memory
from training.precision import autocast_dtype
from training.run_log import device_name

# small networks first
STATIC = [name.removesuffix("_dcd") for name in sorted(dcd.list_models(), key=len) if name.endswith("_dcd")]


def describe_machine(device: torch.device) -> dict:
    """What a figure must be read with."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join([f"python -m tools.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
    }


def main(
    models: tuple[str, ...] = tuple(STATIC),
    batch_size: int | None = None,
    size: int = 224,
    rounds: int = 5,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    amp: Literal["auto", "bf16", "fp16", "off"] = "auto",
    channels_last: bool = True,
    compile: bool = False,
    json_file: Path | None = None,
) -> None:
    """Print images/s of each DCD model and its static twin, and the ratio: in training, in inference, and in inference
    with the batch norms folded (`dcd.deploy.fold`).

    Args:
        models: names of the static twins.
        batch_size: images in a batch; by default 256 on a GPU and 8 on a CPU.
        size: side of the images in pixels.
        rounds: timed steps of each model.
        device: auto takes the GPU where there is one.
        amp: auto is bf16 where the device computes in it.
        channels_last: memory format of models and images.
        compile: compile the models with torch.compile.
        json_file: write the figures here as well.
    """
    unknown = sorted(set(models) - set(STATIC))
    if unknown:
        sys.exit(f"error: --models {' '.join(unknown)}: use static names, of {', '.join(STATIC)}")
    where = torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")
    if where.type == "cpu":
        keep_freed_memory()  # as in training
    batch_size = batch_size or (256 if where.type == "cuda" else 8)
    dtype = autocast_dtype(amp, where)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, size, size).to(where, memory_format=memory_format)
    labels = torch.randint(1000, (batch_size,)).to(where)

    def autocast():
        return torch.autocast(where.type, dtype=dtype, enabled=dtype is not None)

    machine = describe_machine(where)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"batch {batch_size}, {size} pixels, {dtype or 'fp32'}, {'channels_last' if channels_last else 'NCHW'}")
    print(f"\n| model | {'mode':9} | static images/s | DCD images/s | ratio |\n|---|---|---|---|---|")
    rows = []
    for name in tqdm(models, disable=not sys.stderr.isatty(), leave=False):
        kwargs = {"fc_squeeze": 16} if name == "mobilenetv2" else {}  # as published
        pair = [dcd.create_model(name), dcd.create_model(f"{name}_dcd", **kwargs)]
        pair = [model.to(where, memory_format=memory_format) for model in pair]
        for mode in ("training", "inference", "folded"):
            if mode == "folded":
                pair = [dcd.deploy.fold(model) for model in pair]
            called = [torch.compile(model) if compile else model for model in pair]
            if mode == "training":
                steps = [train_step(model, images, labels, autocast) for model in called]
            else:
                steps = [inference_step(model, images, autocast) for model in called]
            static, dynamic = seconds_in_turns(steps, rounds, where)
            row = {
                "model": name,
                "mode": mode,
                "static_images_per_sec": batch_size / statistics.median(static),
                "dcd_images_per_sec": batch_size / statistics.median(dynamic),
                "ratio": statistics.median(s / d for s, d in zip(static, dynamic, strict=True)),
            }
            rows.append(row)
            rates = f"{row['static_images_per_sec']:.1f} | {row['dcd_images_per_sec']:.1f} | {row['ratio']:.2f}"
            tqdm.write(f"| {name} | {mode} | {rates} |", file=sys.stdout)
        del pair, called, steps
        gc.collect()
    if json_file is not None:
        settings = {"batch_size": batch_size, "size": size, "rounds": rounds, "dtype": str(dtype or torch.float32)}
        json_file.write_text(json.dumps({"machine": machine, "settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    parse(main)
