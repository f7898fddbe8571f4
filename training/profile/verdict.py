"""Name the bottleneck of a training run and what would help: one sentence from measured numbers."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from training.profile.step_timer import StepTimes

# From these shares of a step on, a phase is the bottleneck, even if the model itself takes more.
WAITING, REDUCING, STEPPING, REST = 0.10, 0.20, 0.30, 0.20
# Loader and model disturb each other if together they reach less than this share of the slower one alone; or if a step
# waits for a loader that alone is faster than the model.
TOGETHER = 0.75
# If the GPU ends a step within this share of its time after the host, its queue is empty.
QUEUED = 0.05


class Rates(NamedTuple):
    """Images/s over all ranks: of the loader alone, of the model alone, of both together."""

    loader: float
    model: float
    together: float


@dataclass(frozen=True)
class Setting:
    """The options of a run that could be changed.

    device: "cpu" or "cuda". workers, cores: loading workers and cores of this machine.
    backend, exact_decode: as given, so backend may be "auto". converted: the data are .beton files.
    mixed: in mixed precision. compiled: by torch.compile. graphs: steps are replayed from a CUDA graph, but for those
        that are timed.
    """

    device: str
    workers: int
    cores: int
    world_size: int
    backend: str
    converted: bool
    exact_decode: bool
    mixed: bool
    compiled: bool
    graphs: bool = False


class Verdict(NamedTuple):
    """The bottleneck, and a sentence that names it with the figures and says what would help."""

    bound: Literal["contention", "loader", "copy", "reduction", "loop", "launching", "optimizer", "model"]
    sentence: str


def find_bound(times: StepTimes, setting: Setting, rates: Rates | None = None) -> Verdict:
    """The first cause that holds, from those outside the model to the model itself.

    Args:
        times: of training steps. rates: in training, or None if loader and model were not measured alone.
    """
    share = times.shares
    waits = share["data"] >= WAITING and share["data"] >= share["copy"]
    if rates is not None and (
        rates.together < TOGETHER * min(rates.loader, rates.model) or (waits and rates.loader > rates.model)
    ):
        return Verdict(
            "contention",
            f"Loader and model are in each other's way: together they reach {rates.together:,.0f} images/s, alone "
            f"{rates.loader:,.0f} and {rates.model:,.0f}; what would help: {_or(_less_contention(setting))}.",
        )
    if share["reduce"] >= REDUCING and share["reduce"] > share["data"] + share["copy"]:
        return Verdict(
            "reduction",
            f"Reducing gradients over {setting.world_size} ranks limits this run: {_percent(share['reduce'])} of a "
            f"step waits for it after backward; what would help: {_or(_less_reduction(setting))}.",
        )
    if waits:
        alone = f" (alone it gives {rates.loader:,.0f} images/s, the model takes {rates.model:,.0f})" if rates else ""
        return Verdict(
            "loader",
            f"The loader limits this run: {_percent(share['data'])} of a step waits for data{alone}; "
            f"what would help: {_or(_faster_loading(setting))}.",
        )
    if share["copy"] >= WAITING:
        return Verdict(
            "copy",
            f"Copies to the device limit this run: {_percent(share['copy'])} of a step waits for them; "
            f"what would help: {_or(_less_copying(setting))}.",
        )
    if share["other"] >= REST:
        return Verdict(
            "loop",
            f"The loop around the model limits this run: {_percent(share['other'])} of a step goes into metrics and "
            "the log; what would help: a higher --print-freq, or a larger --batch-size.",
        )
    if setting.device == "cuda" and times.host_lead_s < QUEUED * times.step_time_s:
        graphs = "the CUDA graph from which the steps behind these are replayed" if setting.graphs else "--cuda-graphs"
        ways = [graphs, *_unless(setting.compiled, "--compile"), "a larger --batch-size"]
        return Verdict(
            "launching",
            f"Launching kernels limits this run: the GPU ends a step of {1000 * times.step_time_s:.1f} ms only "
            f"{1000 * times.host_lead_s:.1f} ms after the host has launched it; what would help: {_or(ways)}.",
        )
    if share["optimizer"] >= STEPPING:
        return Verdict(
            "optimizer",
            f"The optimizer limits this run: {_percent(share['optimizer'])} of a step goes into it; what would help: "
            "a larger --batch-size (with --accumulate where memory is short), which steps less often.",
        )
    return Verdict(
        "model",
        f"The model limits this run: {_percent(share['forward'] + share['backward'])} of a step goes into forward and "
        f"backward; what would help: {_or(_faster_model(setting))}.",
    )


def _less_contention(setting: Setting) -> list[str]:
    if setting.workers == 0:
        return [f"--workers {setting.cores}, which load while the model computes"]
    if setting.device == "cpu":
        return ["more cores, which both share", "a GPU for the model", *_cheaper_images(setting)]
    on_gpu = setting.backend in ("auto", "dali", "torchvision")
    ways = _unless(not (on_gpu and setting.converted), "--backend ffcv, which leaves the GPU to the model")
    if setting.workers > 1:
        ways.append(f"fewer --workers (now {setting.workers} on {setting.cores} cores), which leaves cores to the host")
    return [*ways, *_unless(setting.compiled, "--compile, which launches fewer kernels")]


def _less_reduction(setting: Setting) -> list[str]:
    machines = "a faster connection of the ranks" if setting.device == "cuda" else "fewer ranks with more threads each"
    return ["a larger --batch-size (with --accumulate where memory is short), which reduces less often", machines]


def _faster_loading(setting: Setting) -> list[str]:
    if setting.workers < setting.cores:
        return [f"--workers {setting.cores} (now {setting.workers})"]
    gpu = setting.device == "cuda" and setting.backend in ("ffcv", "torchvision")
    return [*_unless(not gpu, "--backend dali, which decodes on the GPU"), *_cheaper_images(setting), "more cores"]


def _cheaper_images(setting: Setting) -> list[str]:
    return [
        *_unless(setting.converted, "images converted to .beton by tools.make_dataset"),
        *_unless(not setting.exact_decode, "no --exact-decode"),
        "a smaller --input-size",
    ]


def _less_copying(setting: Setting) -> list[str]:
    return [*_unless(setting.backend == "dali", "--backend dali, which copies JPEGs only"), "a smaller --input-size"]


def _faster_model(setting: Setting) -> list[str]:
    if setting.device == "cpu":
        return ["a GPU", "more cores", "a smaller --input-size"]
    return [
        *_unless(setting.mixed, "--amp bf16 or fp16"),
        *_unless(setting.compiled, "--compile"),
        "a larger --batch-size",
        "more GPUs",
        "a smaller --input-size",
    ]


def _unless(is_so: bool, way: str) -> list[str]:
    return [] if is_so else [way]


def _or(ways: list[str]) -> str:
    return ways[0] if len(ways) == 1 else f"{', '.join(ways[:-1])} or {ways[-1]}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
