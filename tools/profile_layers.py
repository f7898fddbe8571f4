"""Measure dynamic convolutions beside the static one, as layers and as networks, on a resident batch.

    python -m tools.profile_layers                          the layers of ResNet-50, and three whole networks
    python -m tools.profile_layers --models --layers --shapes 64x256k1s1@56 256x256k3s1@14
    python -m tools.profile_layers --models resnet50 --variants odconv "dcd fused" --amp off bf16 --modes eager compiled
    python -m tools.profile_layers --layers --variants "dcd auto" --fold --amp auto       as `make bench-model`

Variants: static, the layers of `dcd.layers.rivals`, and DCD by each of its paths. They take turns, step by step or
window by window, so that whatever else the machine does falls on all of them. OUT.md has tables of times, rates, memory
and multiply-adds, OUT.json the same and the time of every round (also where the program is cut off, of what was done),
OUT_networks.png the networks' rates over their parameters, OUT_parts.png the time by part of the DCD layers.
"""

import sys
from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch

from tools.profiling.layer_report import plot_networks, plot_parts, tables
from tools.profiling.machine import describe_machine
from tools.profiling.measure import Extent, Row, Subject, measure
from tools.profiling.parts import PartTime, time_by_part
from tools.profiling.report import write_figures, write_report
from tools.profiling.runner import DTYPES, Setting
from tools.profiling.shapes import ShapeError, parse_shape, shapes_of
from tools.profiling.variants import (
    NETWORKS,
    STATIC,
    all_variants,
    create_layer,
    create_model,
    has_layer,
    has_model,
    other_variants,
)
from training.command_line import parse
from training.host_memory import keep_freed_memory, spare_garbage_collector
from training.precision import allow_fast_products, autocast_dtype

Mode = Literal["eager", "compiled", "CUDA graph", "compiled, CUDA graph", "DataParallel"]


def main(
    models: tuple[str, ...] = ("resnet18", "resnet50", "mobilenetv2"),
    layers: tuple[str, ...] = ("resnet50",),
    shapes: tuple[str, ...] = (),
    variants: tuple[str, ...] = (),
    batch_size: int | None = None,
    size: int = 224,
    rounds: int = 5,
    device: Literal["auto", "cuda", "cpu"] = "auto",
    memory_formats: tuple[Literal["channels_last", "nchw"], ...] = ("channels_last",),
    amp: tuple[Literal["auto", "bf16", "fp16", "off"], ...] = ("off",),
    modes: tuple[Mode, ...] = ("eager",),
    compiler: str = "inductor",
    matmul_precision: Literal["highest", "high"] = "high",
    window_s: float = 0.0,
    inference: bool = True,
    fold: bool = False,
    floor: bool = False,
    pictures: bool = True,
    out: Path = Path("runs/layers"),
) -> None:
    """Measure the variants of layers and networks.

    Args:
        models: networks that are measured as a whole, in every form that they have; may be empty.
        layers: networks whose dynamic convolutions are measured, each distinct shape once; may be empty.
        shapes: more layers, as 64x256k1s1@56: channels in x out, kernel, stride @ pixels.
        variants: of static (always measured), the names in `dcd.layers.rivals.RIVALS` (se, condconv, ...), "dcd PATH";
            by default all of these. Also "dcd auto", the path that training takes, "dcd PATH FORM", and of networks
            "static reference", the static one without Triton's kernels.
        batch_size: images in a batch; by default 64 on a GPU (a GPU's share in the published trainings) and 4 on a CPU.
        size: side of the images in pixels.
        rounds: timed steps, or windows, of each variant.
        device: auto takes the GPU where there is one.
        memory_formats: memory formats of models and images.
        amp: the precisions: off is fp32; auto is bf16 where the device computes in it, else fp32.
        modes: how they are run: compiled by torch.compile, which takes minutes on a CPU; as a CUDA graph, without the
            cost of launching kernels one by one; in DataParallel of one GPU. Graphs and DataParallel need a GPU.
        compiler: the backend of torch.compile.
        matmul_precision: of float32: high as in training, on a GPU in TF32; highest is PyTorch's default.
        window_s: time windows of about so many seconds of whole steps; by default single steps, by their parts.
        inference: measure inference, too.
        fold: measure inference with the batch norms folded into the weights, too.
        floor: compare the training of each layer with the least time that memory and matrix units allow.
        pictures: draw them.
        out: where OUT.md, OUT.json, OUT_networks.png and OUT_parts.png are written.
    """
    where = torch.device(device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if where.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: there is no GPU")
    batch_size = (64 if where.type == "cuda" else 4) if batch_size is None else batch_size
    for name, value, least in (("--batch-size", batch_size, 2), ("--size", size, 32), ("--rounds", rounds, 1)):
        if value < least:
            sys.exit(f"error: {name} {value}: must be at least {least}")
    chosen = chosen_variants(variants, where)
    subjects = chosen_subjects(models, layers, shapes, size)
    names = {dtype: name for name, dtype in DTYPES.items()}
    precisions = dict.fromkeys(names[autocast_dtype(each, where) or torch.float32] for each in amp)
    settings = [Setting(*each, compiler) for each in product(memory_formats, precisions, modes)]
    if not subjects or not settings:
        sys.exit("error: nothing to measure: name --models, --layers or --shapes, --memory-formats, --amp and --modes")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"error: {error}")

    torch.backends.cudnn.benchmark = True  # this and the following as in training
    torch.set_float32_matmul_precision(matmul_precision)
    spare_garbage_collector()
    if where.type == "cpu":
        keep_freed_memory()
    extent = Extent(where, batch_size, rounds, window_s, inference, fold, floor)
    machine = {**describe_machine(where), "batch_size": batch_size, "size": size, "rounds": rounds}
    machine |= {"window_s": window_s, "matmul_precision": matmul_precision}
    rows: list[Row] = []
    times: list[PartTime] = []
    failures: list[str] = []
    number = 0
    for setting in settings:
        if matmul_precision == "high":
            allow_fast_products(where, DTYPES[setting.precision])
        for subject in subjects:
            number += 1
            what = " ".join(part for part in (subject.network, subject.layer) if part)
            print(f"{number} of {len(settings) * len(subjects)}: {what}, {setting}", file=sys.stderr)
            measured, failed = measure(subject, tuple(filter(subject.has, chosen)), setting, extent)
            rows += measured
            failures += failed
            write_figures(out, machine, rows=rows, failures=failures)
        if setting.mode == "eager" and not window_s:
            for network in layers:
                for shape, count in shapes_of(network, size).items():
                    times += time_by_part(network, shape, count, setting, extent)
    write_report(out, machine, tables(rows, times, failures), rows=rows, parts=times, failures=failures)
    if pictures:
        plot(rows, times, out, f"batches of {batch_size}, networks at {size} pixels")
    if failures:
        sys.exit(f"error: not everything could be measured: {failures[0]}")


def chosen_variants(variants: Iterable[str], device: torch.device) -> list[str]:
    """Static, and the named variants, or all: in their usual order."""
    known, others = all_variants(device), other_variants(device)
    _refuse_unknown("--variants", variants, (*known, *others))
    return [name for name in (*known, *others) if name in (STATIC, *(variants or known))]


def chosen_subjects(models: Iterable[str], layers: Iterable[str], shapes: Iterable[str], size: int) -> list[Subject]:
    """What is measured: networks as a whole, the layers of networks, and the given shapes."""
    _refuse_unknown("--models", models, NETWORKS)
    _refuse_unknown("--layers", layers, NETWORKS)
    try:
        given = [("", parse_shape(text), 1) for text in shapes]
    except ShapeError as error:
        sys.exit(f"error: {error}")
    subjects = [
        Subject(name, "", 1, (3, size, size), partial(create_model, name), partial(has_model, name)) for name in models
    ]
    found = [(network, shape, count) for network in layers for shape, count in shapes_of(network, size).items()]
    for network, shape, count in found + given:
        build, has = partial(create_layer, shape), partial(has_layer, shape)
        subjects.append(Subject(network, str(shape), count, (shape.in_channels, shape.size, shape.size), build, has))
    return subjects


def _refuse_unknown(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"error: {flag} {unknown[0]}: use {', '.join(known)}")


def plot(rows: list[Row], times: list[PartTime], out: Path, what: str) -> None:
    """The pictures beside OUT.md, of what was measured."""
    if networks := [row for row in rows if not row.layer]:
        plot_networks(networks, out.with_name(f"{out.name}_networks.png"), what)
    if times:
        plot_parts(times, out.with_name(f"{out.name}_parts.png"), f"DCD layers by the reference, {what}")


if __name__ == "__main__":
    parse(main)
