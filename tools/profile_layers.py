"""Measure dynamic convolutions beside the static one, as layers and as networks, on a resident batch.

    python -m tools.profile_layers                          the layers of ResNet-50, and three whole networks
    python -m tools.profile_layers --models --layers --shapes 64x256k1s1@56 256x256k3s1@14
    python -m tools.profile_layers --models resnet50 --variants odconv "dcd fused" --amp --compile --device cuda

Variants: static, squeeze-and-excitation, CondConv, DY-Conv, ODConv, and DCD by each of its paths. They take turns, step
by step, so that whatever else the machine does falls on all of them. OUT.md has tables of times, rates, memory and
multiply-adds, OUT.json the same and the time of every round, OUT_networks.png the networks' rates over their
parameters, OUT_parts.png the time by part of the DCD layers.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from tools.bench_model import STATIC as NETWORKS
from tools.bench_model import describe_machine
from tools.profiling.measure import Row, Setting, Subject, measure
from tools.profiling.parts import PartTime, time_by_part
from tools.profiling.report import plot_networks, plot_parts, report
from tools.profiling.shapes import Shape, ShapeError, parse_shape, shapes_of
from tools.profiling.variants import STATIC, all_variants, create_layer, create_model, has_model
from training.command_line import parse
from training.cpu_memory import keep_freed_memory


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
    amp: bool = False,
    compile: bool = False,
    out: Path = Path("runs/layers"),
) -> None:
    """Measure the variants of layers and networks.

    Args:
        models: networks that are measured as a whole, in every form that they have; may be empty.
        layers: networks whose dynamic convolutions are measured, each distinct shape once; may be empty.
        shapes: more layers, as 64x256k1s1@56: channels in x out, kernel, stride @ pixels.
        variants: of static (always measured), se, condconv, dyconv, odconv and "dcd PATH"; by default all.
        batch_size: images in a batch; by default 64 on a GPU (a GPU's share in the published trainings) and 4 on a CPU.
        size: side of the images in pixels.
        rounds: timed steps of each variant.
        device: auto takes the GPU where there is one.
        memory_formats: memory formats of models and images.
        amp: measure mixed precision (bf16) beside fp32.
        compile: measure what torch.compile makes beside eager; compiling takes minutes on a CPU.
        out: where OUT.md, OUT.json, OUT_networks.png and OUT_parts.png are written.
    """
    gpu = torch.cuda.is_available()
    where = torch.device("cuda" if device == "cuda" or (device == "auto" and gpu) else "cpu")
    if where.type == "cuda" and not gpu:
        sys.exit("error: --device cuda: there is no GPU")
    batch_size = (64 if where.type == "cuda" else 4) if batch_size is None else batch_size
    known = all_variants(where)
    _refuse_unknown("--models", models, NETWORKS)
    _refuse_unknown("--layers", layers, NETWORKS)
    _refuse_unknown("--variants", variants, known)
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
    if not subjects or not memory_formats:
        sys.exit("error: nothing to measure: name --models, --layers or --shapes, and --memory-formats")

    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")  # as in training
    if where.type == "cpu":
        keep_freed_memory()
    chosen = tuple(name for name in known if name == STATIC or name in (variants or known))
    precisions = ("fp32", "bf16") if amp else ("fp32",)
    modes = ("eager", "compiled") if compile else ("eager",)
    settings = [Setting(*choice) for choice in product(memory_formats, precisions, modes)]
    rows, times, failures = [], [], []
    for setting, subject in tqdm(list(product(settings, subjects)), disable=not sys.stderr.isatty(), leave=False):
        names = tuple(name for name in chosen if subject.layer or has_model(subject.network, name))
        measured, failed = measure(subject, names, setting, batch_size, rounds, where)
        rows += measured
        failures += failed
    for setting, network in product((s for s in settings if s.mode == "eager"), layers):
        for shape, count in found[network].items():
            times += time_by_part(network, shape, count, setting, batch_size, rounds, where)

    machine = {**describe_machine(where), "batch_size": batch_size, "size": size, "rounds": rounds}
    write(out, machine, rows, times, failures)
    if failures:
        sys.exit(f"error: not everything could be measured: {failures[0]}")


def write(out: Path, machine: dict, rows: list[Row], times: list[PartTime], failures: list[str]) -> None:
    """Print the report, and write it with all figures and the plots. machine: what the figures must be read with."""
    text = f"{', '.join(f'{key} {value}' for key, value in machine.items())}\n\n{report(rows, times, failures)}"
    print(text)
    ending = {kind: out.with_name(out.name + kind) for kind in (".md", ".json", "_networks.png", "_parts.png")}
    ending[".md"].write_text(f"{text}\n")
    record = {
        "machine": machine,
        "rows": [asdict(row) for row in rows],
        "parts": [asdict(time) for time in times],
        "failures": failures,
    }
    ending[".json"].write_text(json.dumps(record, indent=2) + "\n")
    what = f"batches of {machine['batch_size']}, networks at {machine['size']} pixels"
    networks = [row for row in rows if not row.layer]
    if networks:
        plot_networks(networks, ending["_networks.png"], what)
    if times:
        plot_parts(times, ending["_parts.png"], f"DCD layers by the reference, {what}")


def _refuse_unknown(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"error: {flag} {unknown[0]}: use {', '.join(known)}")


if __name__ == "__main__":
    parse(main)
