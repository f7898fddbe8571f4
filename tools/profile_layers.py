"""Measure dynamic convolutions beside the static one, as layers and as networks, on a resident batch.

    python -m tools.profile_layers                          the layers of ResNet-50, and three whole networks
    python -m tools.profile_layers --models --layers --shapes 64x256k1s1@56 256x256k3s1@14
    python -m tools.profile_layers --models resnet50 --variants odconv "dcd fused" --amp off bf16 --compile
    python -m tools.profile_layers --layers --variants "dcd auto" --fold --amp auto       as `make bench-model`

Variants: static, the layers of `dcd.layers.rivals`, and DCD by each of its paths. They take turns, step
by step, so that whatever else the machine does falls on all of them. OUT.md has tables of times, rates, memory and
multiply-adds, OUT.json the same and the time of every round, OUT_networks.png the networks' rates over their
parameters, OUT_parts.png the time by part of the DCD layers.
"""

import sys
from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from tools.profiling.layer_report import plot_networks, plot_parts, tables
from tools.profiling.machine import describe_machine
from tools.profiling.measure import Extent, Row, Subject, measure
from tools.profiling.parts import PartTime, time_by_part
from tools.profiling.report import write_report
from tools.profiling.runner import DTYPES, Setting
from tools.profiling.shapes import Shape, ShapeError, parse_shape, shapes_of
from tools.profiling.variants import (
    NETWORKS,
    STATIC,
    all_variants,
    create_layer,
    create_model,
    has_model,
    other_variants,
)
from training.command_line import parse
from training.cpu_memory import keep_freed_memory
from training.precision import autocast_dtype


def layer_subject(network: str, shape: Shape, count: int) -> Subject:
    input_shape = (shape.in_channels, shape.size, shape.size)
    return Subject(network, str(shape), count, input_shape, partial(create_layer, shape))


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
    fold: bool = False,
    compile: bool = False,
    out: Path = Path("runs/layers"),
) -> None:
    """Measure the variants of layers and networks.

    Args:
        models: networks that are measured as a whole, in every form that they have; may be empty.
        layers: networks whose dynamic convolutions are measured, each distinct shape once; may be empty.
        shapes: more layers, as 64x256k1s1@56: channels in x out, kernel, stride @ pixels.
        variants: of static (always measured), the names in `dcd.layers.rivals.RIVALS` (se, condconv, ...), "dcd PATH";
            by default all of these. Also "dcd auto", the path that training takes, and "dcd PATH FORM".
        batch_size: images in a batch; by default 64 on a GPU (a GPU's share in the published trainings) and 4 on a CPU.
        size: side of the images in pixels.
        rounds: timed steps of each variant.
        device: auto takes the GPU where there is one.
        memory_formats: memory formats of models and images.
        amp: the precisions: off is fp32; auto is bf16 where the device computes in it, else fp32.
        fold: measure inference with the batch norms folded into the weights, too.
        compile: measure what torch.compile makes beside eager; compiling takes minutes on a CPU.
        out: where OUT.md, OUT.json, OUT_networks.png and OUT_parts.png are written.
    """
    gpu = torch.cuda.is_available()
    where = torch.device("cuda" if device == "cuda" or (device == "auto" and gpu) else "cpu")
    if where.type == "cuda" and not gpu:
        sys.exit("error: --device cuda: there is no GPU")
    batch_size = (64 if where.type == "cuda" else 4) if batch_size is None else batch_size
    known, others = all_variants(where), other_variants(where)
    _refuse_unknown("--models", models, NETWORKS)
    _refuse_unknown("--layers", layers, NETWORKS)
    _refuse_unknown("--variants", variants, (*known, *others))
    for name, value, least in (("--batch-size", batch_size, 2), ("--size", size, 32), ("--rounds", rounds, 1)):
        if value < least:
            sys.exit(f"error: {name} {value}: must be at least {least}")
    try:
        given = [parse_shape(text) for text in shapes]
        out.parent.mkdir(parents=True, exist_ok=True)
    except (ShapeError, OSError) as error:
        sys.exit(f"error: {error}")
    found = {network: shapes_of(network, size) for network in layers}
    subjects = [Subject(network, "", 1, (3, size, size), partial(create_model, network)) for network in models]
    subjects += [layer_subject(network, *item) for network in layers for item in found[network].items()]
    subjects += [layer_subject("", shape, 1) for shape in given]
    names = {dtype: name for name, dtype in DTYPES.items()}
    precisions = dict.fromkeys(names[autocast_dtype(each, where) or torch.float32] for each in amp)
    settings = [Setting(*each) for each in product(memory_formats, precisions, ("eager", "compiled")[: 1 + compile])]
    if not subjects or not settings:
        sys.exit("error: nothing to measure: name --models, --layers or --shapes, and --memory-formats and --amp")

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # as in training
    if where.type == "cpu":
        keep_freed_memory()
    chosen = [name for name in (*known, *others) if name in (STATIC, *(variants or known))]
    extent = Extent(where, batch_size, rounds, fold=fold)
    rows, failures = measure_all(subjects, settings, chosen, extent)
    times = [
        time
        for setting, network in product((setting for setting in settings if setting.mode == "eager"), layers)
        for shape, count in found[network].items()
        for time in time_by_part(network, shape, count, setting, extent)
    ]
    machine = {**describe_machine(where), "batch_size": batch_size, "size": size, "rounds": rounds}
    write_report(out, machine, tables(rows, times, failures), rows=rows, parts=times, failures=failures)
    plot(rows, times, out, f"batches of {batch_size}, networks at {size} pixels")
    if failures:
        sys.exit(f"error: not everything could be measured: {failures[0]}")


def measure_all(
    subjects: list[Subject], settings: list[Setting], variants: list[str], extent: Extent
) -> tuple[list[Row], list[str]]:
    """Every subject in every setting; see `measure`."""
    rows, failures = [], []
    for setting, subject in tqdm(list(product(settings, subjects)), disable=not sys.stderr.isatty(), leave=False):
        forms = tuple(name for name in variants if subject.layer or has_model(subject.network, name))
        measured, failed = measure(subject, forms, setting, extent)
        rows += measured
        failures += failed
    return rows, failures


def plot(rows: list[Row], times: list[PartTime], out: Path, what: str) -> None:
    """The pictures beside OUT.md, of what was measured."""
    if networks := [row for row in rows if not row.layer]:
        plot_networks(networks, out.with_name(f"{out.name}_networks.png"), what)
    if times:
        plot_parts(times, out.with_name(f"{out.name}_parts.png"), f"DCD layers by the reference, {what}")


def _refuse_unknown(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"error: {flag} {unknown[0]}: use {', '.join(known)}")


if __name__ == "__main__":
    parse(main)
