"""What each section of `benchmarks.gpu_check` runs, and what it takes from the figures of these programs."""

import os
import shutil
import statistics
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.section import ROOT, Section
from dcd.layers import available_paths
from dcd.layers.rivals import RIVALS
from pipelines.executors.dali_executor import is_installed as has_dali
from pipelines.executors.dali_probe import why_no_box_decode
from tools.profiling.report import markdown_table
from tools.profiling.variants import AUTO, PLAIN, STATIC
from training.profile.verdict import Rates

Options = dict[str, Any]  # of a program's function

# Tests

WORKERS = 6  # tests at a time; most of them wait for a compiler
SANITIZED = [f"tests/dcd/test_triton{name}.py" for name in ("", "_matrices", "_norm")] + ["-q", "-x", "-k"]
SANITIZED += ["triton-3x3 or positions or zeros or kernels_of_the_images"]
SUMMARY = ("-rfEs", "--continue-on-collection-errors")  # a missing package in one file does not stop the others


def correctness(section: Section) -> None:
    """All at the same time: none measures times, but for the compiler, which has two cores."""
    jobs = (run_tests, sanitize, compare_pixels, compile_networks)
    section.at_the_same_time(*(partial(job, section) for job in jobs))


def run_tests(section: Section) -> None:
    """The tests marked `gpu`."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))  # others may import packages that are not installed here
    marked = [str(file.relative_to(ROOT)) for file in files if "mark.gpu" in file.read_text()]
    tests = [*marked, "-m", "gpu", *(["-n", str(WORKERS)] if find_spec("xdist") else [])]
    if section.rehearsal:
        tests = ["tests/dcd/test_triton.py", "-k", "positions"]
    _, output = section.run("tests marked gpu", [sys.executable, "-m", "pytest", "-q", *SUMMARY, *tests])
    read_summary(section, output)


def read_summary(section: Section, output: str) -> None:
    """Record the counts and each failed or skipped test, from the end of pytest's output (`-q` and `SUMMARY`)."""
    lines = output.strip().splitlines() or ["no output"]
    for line in lines:
        outcome, _, what = line.partition(" ")
        if outcome in ("FAILED", "ERROR"):
            section.fail(*(what.split(" - ", 1) if " - " in what else (what, outcome.lower())))
        if outcome == "SKIPPED":
            section.skip("tests", what)
    if " passed" in lines[-1]:
        section.found.text.append(f"Tests marked gpu: {lines[-1].strip('= ')}.")
    else:
        section.fail("tests marked gpu", f"none passed: {lines[-1]}")


def sanitize(section: Section) -> None:
    """Look for reads and writes out of bounds in some of the tests of the Triton kernels."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        section.skip("compute-sanitizer", "it is not installed here")
        return
    command = [program, "--tool", "memcheck", "--error-exitcode", "99", sys.executable, "-m", "pytest", *SANITIZED]
    # Without PyTorch's cache each tensor is an allocation of its own, with known bounds.
    code, output = section.run("compute-sanitizer", command, optional=True, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    words = ("ERROR SUMMARY", "passed", "Error")
    lines = [line.strip("= ") for line in output.splitlines() if any(word in line for word in words)]
    if code:
        section.fail("compute-sanitizer", f"exit code {code}: {'; '.join(lines[-4:])}")
    elif code == 0:
        section.found.text.append(f"compute-sanitizer (memcheck) over the Triton kernels: {'; '.join(lines[-4:])}.")


# Models

REFERENCE, FUSED = "dcd reference", "dcd fused"
MEASURED: Options = {"layers": (), "amp": ("bf16",), "batch_size": 256, "rounds": 3, "window_s": 1.1, "pictures": False}
# A rehearsal: two layers in place of networks, and two runs of PLAN
TINY: Options = {"models": (), "layers": (), "shapes": ("64x64k1s1@8", "64x64k3s1@8"), "batch_size": 2, "rounds": 1}
TINY |= {"window_s": 0.01, "compiler": "eager"}
REHEARSED = ("eager", "compiled")
RESNET50: Options = {"models": ("resnet50",)}
MOBILENET: Options = {"models": ("mobilenetv2",)}
DYNAMIC: Options = {"variants": (AUTO,)}
TRAINING: Options = {"inference": False}
GRAPH: Options = {"modes": ("CUDA graph",)}
COMPILED: Options = {"variants": (REFERENCE, FUSED), "modes": ("compiled",)}
# As the official code: plain operations, float32, NCHW, DataParallel on one GPU, PyTorch's default precision
OFFICIAL: Options = {"variants": (REFERENCE,), "amp": ("off",), "memory_formats": ("nchw",), "modes": ("DataParallel",)}
OFFICIAL["matmul_precision"] = "highest"
# Runs of tools.profile_layers. The most important ones come first, in case the time runs out.
PLAN: dict[str, Options] = {
    "eager": {"models": ("resnet50", "mobilenetv2"), **DYNAMIC, "fold": True},
    "official": RESNET50 | OFFICIAL,
    "compiled": RESNET50 | COMPILED,
    "CUDA graph": RESNET50 | DYNAMIC | GRAPH,
    "other paths": RESNET50 | {"variants": (REFERENCE, FUSED, PLAIN)},
    "rivals": TRAINING | {"models": ("resnet18",), "variants": (AUTO, *RIVALS)},
    "official, others": TRAINING | OFFICIAL | {"models": ("mobilenetv2", "resnet18")},
    "MobileNetV2 compiled": TRAINING | MOBILENET | COMPILED,
    "MobileNetV2 as a CUDA graph": TRAINING | MOBILENET | DYNAMIC | GRAPH,
    **{f"batch {size}": TRAINING | RESNET50 | DYNAMIC | {"batch_size": size} for size in (512, 128, 1024)},
    "compiled, CUDA graph": TRAINING | RESNET50 | COMPILED | {"modes": ("compiled, CUDA graph",)},
}


def profile(section: Section, what: str, **options: Any) -> dict:
    """What tools.profile_layers finds."""
    options = {**MEASURED, **options, **(TINY if section.rehearsal else {}), "device": section.device}
    return section.measure(what, "tools.profile_layers", **options)


def compile_networks(section: Section) -> None:
    """How long torch.compile takes. Its cache is kept for the section that times the networks."""
    once: Options = {**COMPILED, "rounds": 1, "window_s": 0.0, "optional": True}
    for network in (RESNET50, MOBILENET)[: 1 if section.rehearsal else 2]:
        profile(section, f"compiling {network['models'][0]}", **network, **once)


def networks(section: Section) -> None:
    """Images/s, ms and memory of whole networks; the batch is halved until it fits."""
    rows, plan = [], [(what, options) for what, options in PLAN.items() if what in REHEARSED or not section.rehearsal]
    while plan:
        what, options = plan.pop(0)
        if not section.rehearsal and not section.has_time(what, seconds_of(options)):
            continue
        found = profile(section, what, **options)
        rows += found.get("rows", [])
        if any("OutOfMemoryError" in why for why in found.get("failures", ())):
            size = options.get("batch_size", MEASURED["batch_size"]) // 2
            plan.insert(0, (f"{what}, {size} images", {**options, "batch_size": size}))
    report_targets(section, rows)


def seconds_of(options: dict) -> float:
    """A rough guess of how long a run takes on a GPU: a variant is compiled, searched and timed."""
    return 10 + len(options["models"]) * (1 + len(options["variants"])) * (16 if "compiled" in str(options) else 8)


def report_targets(section: Section, rows: list[dict]) -> None:
    """Compare the figures with the targets: eager with eager, compiled with compiled."""

    def best(figure: str, network: str, variants: tuple[str, ...], *modes: str) -> float | None:
        what = [
            row for row in rows if row["network"] == network and row["variant"] in variants and row["mode"] in modes
        ]
        return max((row[figure] for row in what), default=None)

    rate, to_static = partial(best, "training_images_per_sec", "resnet50"), partial(best, "training_to_static")
    ours, compiled = (AUTO, REFERENCE, FUSED), ("compiled", "compiled, CUDA graph")
    compiled_to_static = quotient(rate(ours, *compiled), rate((STATIC,), *compiled))
    to_official = quotient(rate((AUTO,), "eager"), rate((REFERENCE,), "DataParallel"))
    section.target("resnet50_dcd training to static, both eager", 0.90, to_static("resnet50", (AUTO,), "eager"))
    section.target("resnet50_dcd training to static, both compiled", 0.90, compiled_to_static)
    section.target("resnet50_dcd training to the official formulation", 3.0, to_official)
    every_way = rate(ours, "eager", "CUDA graph", *compiled)
    section.target("resnet50_dcd training, images/s, in its best form", 2500.0, every_way)
    section.target("mobilenetv2_dcd training to static, both eager", 0.70, to_static("mobilenetv2", (AUTO,), "eager"))


def quotient(dividend: float | None, divisor: float | None) -> float | None:
    return dividend / divisor if dividend and divisor else None


def layers(section: Section) -> None:
    """Each DCD layer of ResNet-50 beside its floor; 1×1 layers as maps and as one kernel for each image."""
    path = available_paths(torch.device(section.device))[-1]
    variants = {"variants": (f"dcd {path} kernels", f"dcd {path} maps"), "modes": ("CUDA graph", "eager")}
    measured = {"models": (), "layers": ("resnet50",), "window_s": 0.05, "inference": False, "floor": True}
    profile(section, "layers", **variants, **measured)


# Loaders

DALI, WHOLE = "DALI executor, folder", "DALI executor, folder, whole images, hardware share"
SHARES = (0.0, 0.5, 0.75, 1.0)


def make_images(section: Section) -> Path:
    """Fake ImageNet, made once for all sections."""
    images = section.folder / "fake_ImageNet"
    os.environ["XDG_CACHE_HOME"] = str(section.folder)  # the images' sizes
    if not images.exists():
        train, val = (96, 16) if section.rehearsal else (6144, 512)
        section.measure("fake ImageNet", "benchmarks.make_fake_imagenet", train_images=train, val_images=val)
    return images


def convert_images(section: Section, images: Path) -> Path:
    """The same for FFCV, made once."""
    folder = section.folder / "images_for_FFCV"
    if not folder.exists():
        section.measure("images for FFCV", "tools.make_dataset", src=images)
    return folder


def ways_to_load(section: Section) -> dict[str, dict[str, dict]]:
    """{backend: {row of benchmarks.bench_loader: options of the trainer}}, of those that can be measured here."""
    ways = {"torchvision": {"torchvision executor, folder": {}}, "ffcv": {"FFCV executor": {}}, "dali": {DALI: {}}}
    for backend, is_there in (("ffcv", bool(find_spec("ffcv"))), ("dali", has_dali())):
        if not is_there:
            section.skip(backend, "it is not installed here")
            del ways[backend]
    if "dali" in ways and not section.rehearsal:
        if why_not := why_no_box_decode(torch.device("cuda")):
            section.skip(DALI, f"DALI cannot decode boxes on this GPU: {why_not}")
            del ways["dali"][DALI]
        ways["dali"] |= {f"{WHOLE} {share}": {"dali_full_decode": share} for share in SHARES}
    return ways


def compare_pixels(section: Section) -> None:
    """The pixels of each decoder beside those of Pillow; a crash of one does not lose the others."""
    images = make_images(section)
    amount = {"images": 16, "sizes": (64,)} if section.rehearsal else {"images": 256, "sizes": (224,)}
    for backend in ways_to_load(section) if images.exists() else ():
        options: Options = {"data": images, "backends": (backend,), "device": section.device, **amount}
        section.measure(f"pixels of {backend}", "benchmarks.compare_pixels", **options)


def loaders(section: Section) -> None:
    """The rates of the loaders alone, then training from the fastest way of each backend."""
    images = make_images(section)
    amount = {"epochs": 1, "batch_size": 8, "size": 64} if section.rehearsal else {"epochs": 3}
    best: dict[str, Options] = {}  # {row: options of the trainer}
    for backend, ways in ways_to_load(section).items() if images.exists() else ():
        options: Options = {"data": images, "only": tuple(ways), "device": section.device, "pictures": False, **amount}
        options |= {"beton": convert_images(section, images)} if backend == "ffcv" else {}
        rows = section.measure(f"loader {backend}", "benchmarks.bench_loader", **options).get("rows", [])
        for row in rows:
            if row["error"]:
                section.fail(row["name"], row["error"])
        rates = {row["name"]: statistics.median(row["rates"]) for row in rows if row["rates"]}
        if rates:
            fastest = max(rates, key=lambda name: rates[name])
            best[fastest] = {"backend": backend, **ways[fastest]}
    found = [train_from(section, images, name, options) for name, options in best.items()]
    together = [rates for rates in found if rates]
    heads = ("images/s, trained from", "loader alone", "model alone", "together", "to the smaller of both")
    section.found.text += [markdown_table(heads, together)] if together else []
    quotients = (rates[-1] for rates in together)
    section.target("end to end, to the smaller of loader and model, best loader", 0.97, max(quotients, default=None))


def train_from(section: Section, images: Path, name: str, options: dict) -> tuple | None:
    """Images/s of the loader alone, the model alone and both together, by tools.profile_throughput."""
    root = convert_images(section, images) if options["backend"] == "ffcv" else images
    sizes = {"arch": "resnet50_dcd", "windows": 3, "window_steps": 10}
    if section.rehearsal:
        sizes = {"arch": "mobilenetv2_dcd", "batch_size": 8, "input_size": 64, "windows": 1, "window_steps": 2}
    options = {**options, **sizes, "data": root, "device": section.device, "num_classes": 1000}
    call = "(lambda out, **options: report(ThroughputConfig().with_options(json=out.with_suffix('.json'), **options)))"
    found = section.measure(f"training from {name}", "tools.profile_throughput", call, **options)
    if not found:
        return None
    section.found.text.append(f"Training from {name}: {found['verdict']}")
    rates = Rates(**found["images_per_sec"]["train"])
    return (name, *rates, rates.together / min(rates.loader, rates.model))


def timeline(section: Section) -> None:
    """What the GPU does in the trainer's steps."""
    found = section.measure("time line", "benchmarks.gpu.timeline", device=section.device)
    gaps = found.get("gaps")
    section.target("gaps of more than 5 µs on the GPU's time line, % at most", 3.0, gaps, at_most=True)
