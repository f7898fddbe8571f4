"""What bounds a training run, and what would move it: one sentence from measured numbers."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from training.profile.step_timer import StepTimes

# Shares of a step from which on a phase is what to work on, though the model's own part may be larger.
WAITING, REDUCING, STEPPING, REST = 0.10, 0.20, 0.30, 0.20
# Together at less than this of the slower of both alone, loader and model are in each other's way. So they are where a
# step waits for a loader that alone is faster than the model.
TOGETHER = 0.75
# The GPU ends a step within this share of it after the host: it has nothing queued.
QUEUED = 0.05


class Rates(NamedTuple):
    """Images/s over all ranks: of the loader alone, of the model alone, of both together."""

    loader: float
    model: float
    together: float


@dataclass(frozen=True)
class Setting:
    """What of a run can be changed.

    device: "cpu" or "cuda". workers: that load on this machine, which has `cores`.
    backend: as chosen, so perhaps "auto". converted: the data are .beton files. exact_decode: as chosen.
    mixed: in mixed precision. compiled: by torch.compile.
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


class Verdict(NamedTuple):
    """What bounds the run, and a sentence that says so with the figures, and what would move it."""

    bound: Literal["contention", "loader", "copy", "reduction", "loop", "launching", "optimizer", "model"]
    sentence: str


def find_bound(times: StepTimes, setting: Setting, rates: Rates | None = None) -> Verdict:
    """The verdict on a run; the first that holds, from the causes outside the model to the model itself.

    Args:
        times: of training steps. rates: in training, or None where loader and model were not measured apart.
    """
    share = times.shares
    waits = share["data"] >= WAITING and share["data"] >= share["copy"]
    if rates is not None and (
        rates.together < TOGETHER * min(rates.loader, rates.model) or (waits and rates.loader > rates.model)
    ):
        return Verdict(
            "contention",
            f"Loader and model are in each other's way: together they reach {rates.together:,.0f} images/s, alone "
            f"{rates.loader:,.0f} and {rates.model:,.0f}; what would move it: {_or(_less_contention(setting))}.",
        )
    if share["reduce"] >= REDUCING and share["reduce"] > share["data"] + share["copy"]:
        return Verdict(
            "reduction",
            f"Reducing gradients over {setting.world_size} ranks bounds this run: {_percent(share['reduce'])} of a "
            f"step waits for it after backward; what would move it: {_or(_less_reduction(setting))}.",
        )
    if waits:
        alone = f" (alone it gives {rates.loader:,.0f} images/s, the model takes {rates.model:,.0f})" if rates else ""
        return Verdict(
            "loader",
            f"The loader bounds this run: {_percent(share['data'])} of a step waits for data{alone}; "
            f"what would move it: {_or(_faster_loading(setting))}.",
        )
    if share["copy"] >= WAITING:
        return Verdict(
            "copy",
            f"Copies to the device bound this run: {_percent(share['copy'])} of a step waits for them; "
            f"what would move it: {_or(_less_copying(setting))}.",
        )
    if share["other"] >= REST:
        return Verdict(
            "loop",
            f"The loop around the model bounds this run: {_percent(share['other'])} of a step goes into metrics and "
            "the log; what would move it: a higher --print-freq, or a larger --batch-size.",
        )
    if setting.device == "cuda" and times.host_lead_s < QUEUED * times.step_time_s:
        ways = [*_unless(setting.compiled, "--compile"), "a larger --batch-size"]
        return Verdict(
            "launching",
            f"Launching kernels bounds this run: the GPU ends a step of {1000 * times.step_time_s:.1f} ms only "
            f"{1000 * times.host_lead_s:.1f} ms after the host has launched it; what would move it: {_or(ways)}.",
        )
    if share["optimizer"] >= STEPPING:
        return Verdict(
            "optimizer",
            f"The optimizer bounds this run: {_percent(share['optimizer'])} of a step goes into it; what would move "
            "it: a larger --batch-size (with --accumulate where memory is short), which steps less often.",
        )
    return Verdict(
        "model",
        f"The model bounds this run: {_percent(share['forward'] + share['backward'])} of a step goes into forward and "
        f"backward; what would move it: {_or(_faster_model(setting))}.",
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
