"""Convert the weights of a model to another form, bit for bit; `dcd.load` reads each, and each can be converted back.

    python -m tools.convert_checkpoint runs/x model.safetensors --to safetensors     with a model card, README.md
    python -m tools.convert_checkpoint resnet50_dcd.pth.tar best.pth                 official to own
    python -m tools.convert_checkpoint runs/x resnet50_dcd.pth.tar --to official

    own           a model file, as best.pth of a run
    official      {"arch", "state_dict"} with the names of the official release; of a static network, torchvision's
    timm          {"arch", "state_dict"} with timm's names
    safetensors   own names; the rest as JSON in the metadata, under the key "dcd"

All forms hold the architecture, the names of the classes and the preprocessing beside the weights, as far as the source
says them. What else it holds is left out, and one line names it: the optimizer, and the moving average of the weights
or, where that is taken, the weights themselves.
"""

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dcd.checkpoint_file import AVERAGES, DESCRIPTION, WEIGHTS, CheckpointError
from dcd.model_file import ModelFile, read_model_file
from dcd.upstream import is_dynamic, own_state, timm_names, upstream_names
from tools.checkpoint_options import SAYS_ALL, CheckpointOptions
from tools.model_card import model_card
from training.command_line import parse
from training.whole_files import whole_files

Form = Literal["own", "official", "timm", "safetensors"]
CARD = "README.md"  # as Hugging Face names it
TIMM_WIDTHS = {0.35: "035", 0.5: "050", 0.75: "075", 1.0: "100", 1.4: "140"}  # of its mobilenetv2_NNN


def describe(file: ModelFile) -> dict[str, Any]:
    """What every form says beside the weights.

    architecture, classes, preprocessing: as `dcd.load` reads them.
    dropout: whether there is a dropout before the classifier, which is in the official names; None if not known.
    origin: a key of `model_card.ORIGINS`.
    best: "model", which the weights are, even if they were a moving average.
    best_top1, best_epoch: of the evaluation that these weights had, where they are of a best.pth.
    """
    content = file.content
    config = content.get("config") if "architecture" in content else None
    position = _official_classifier(file)
    dropout, origin = content.get("dropout"), content.get("origin")
    if config:
        dropout, origin = config["dropout"] is not None, "fine-tuned" if config["weight"] else "run"
    elif position is not None:
        dropout, origin = position == 1, origin or "official"
    about = {
        "best": "model",
        "architecture": file.architecture,
        "classes": file.weights.classes,
        "preprocessing": file.preprocessing and file.preprocessing.to_dict(),
        "dropout": dropout,
        "origin": origin,
    }
    if "best_top1" in content and content.get("best") == ("ema" if is_average(file) else "model"):
        about |= {name: content[name] for name in ("best_top1", "best_epoch")}
    return about


def is_average(file: ModelFile) -> bool:
    return file.weights.of == "moving average"


def _official_classifier(file: ModelFile) -> int | None:
    """Where the classifier stands in official names: behind a dropout at 1, else at 0. None for other names."""
    found = {match[1] for name in file.weights.state if (match := re.match(r"classifier\.(\d+)\.cls", name))}
    return int(*found) if len(found) == 1 else None


def left_out(file: ModelFile, about: dict[str, Any], to: Form) -> str | None:
    """A line that names what the source has and the other form has not."""
    taken = AVERAGES if is_average(file) else WEIGHTS
    kept = {*about, "arch", *taken, *(["config"] if to == "own" else [])}
    kept |= {"state_dict"} if "best" in file.content else set()  # in best.pth one of the others, for timm
    keys = [key for key, value in file.content.items() if key not in kept and not isinstance(value, Tensor | None)]
    hint = "; --ema yes takes the moving average" if {*keys} & {*AVERAGES} else ""
    hint = "; --ema no takes the weights that are no average" if {*keys} & {*WEIGHTS} else hint
    return f"left out: {', '.join(map(str, keys))}{hint}" if keys else None


def weights_of(file: ModelFile, dropout: bool | None) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of its shapes; and the tensors as they are, by its own names. No value or type changes.

    Args:
        dropout: whether there is one before the classifier, which the official names depend on.

    Raises:
        CheckpointError: they do not fit, or there is no such model.
    """
    try:
        model = file.create(dropout=0.0 if dropout else None)
    except ValueError as error:
        raise CheckpointError(f"{file.weights.path}: {error}") from error
    state, report = own_state(model, file.weights)
    report.refuse(file.weights.path)
    # Each in memory of its own: a part of a larger tensor would be written with the whole of it.
    return model, {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {names[name]: tensor for name, tensor in state.items()}


def official(model: nn.Module, about: dict[str, Any]) -> tuple[dict[str, str], str | None]:
    """The official names, and what to say of them.

    Raises:
        CheckpointError: such a network has no other names than our own.
    """
    arch, names = about["architecture"]["arch"], upstream_names(model)
    if all(own == theirs for own, theirs in names.items()):
        raise CheckpointError(f"the official release has no {arch}: use --to own or safetensors")
    note = None
    if not is_dynamic(model):
        note = f"the official release has no {arch}: the names are torchvision's"
    elif about["dropout"] is None:
        note = "whether there was a dropout is not known: the names are those of a network without"
    return names, note


def timm(model: nn.Module, about: dict[str, Any]) -> tuple[str, dict[str, str], str | None]:
    """timm's name of the network, its names, and what to say of them.

    Raises:
        CheckpointError: timm has the network, but not of this width.
    """
    arch, names = about["architecture"]["arch"], timm_names(model)
    if arch == "mobilenetv2":
        width = about["architecture"].get("width_mult", 1.0)
        if width not in TIMM_WIDTHS:
            widths = ", ".join(map(str, TIMM_WIDTHS))
            raise CheckpointError(
                f"timm has mobilenetv2 of width_mult {widths}, not {width}: use --to own or safetensors"
            )
        return f"mobilenetv2_{TIMM_WIDTHS[width]}", names, None
    is_own = all(own == theirs for own, theirs in names.items())
    return arch, names, f"timm itself has no {arch}: the names are our own" if is_own else None


def as_safetensors(state: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    """Raises:
    CheckpointError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise CheckpointError("--to safetensors needs the package: pip install safetensors") from error
    return save(state, {"format": "pt", DESCRIPTION: json.dumps(about)})


def saved(content: dict[str, Any], **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def check_target(source: Path, target: Path, to: Form, force: bool) -> None:
    """Raises:
    CheckpointError: the weights, or the card beside safetensors, must not be written, or there is such a file already
        and no `force`.
    """
    if (target.suffix == ".safetensors") != (to == "safetensors"):
        raise CheckpointError(f"--to {to} {target}: a file of safetensors, and no other, is named NAME.safetensors")
    if not target.absolute().parent.is_dir():
        raise CheckpointError(f"no folder {target.absolute().parent} for {target.name}: make it first")
    for file in [target, *([target.with_name(CARD)] if to == "safetensors" else [])]:
        if file.is_dir():
            raise CheckpointError(f"{file} is a folder: name a file")
        if file.exists() and file.samefile(source):
            raise CheckpointError(f"{file} is what is converted: name another file")
        if os.path.lexists(file) and not force:
            raise CheckpointError(f"{file} is there already: name another one, or --force")


def convert(file: ModelFile, target: Path, to: Form) -> tuple[dict[Path, bytes], list[str]]:
    """What to write, and lines about it.

    Raises:
        CheckpointError: the file does not fit, or the form does not have such a network.
    """
    about, note = describe(file), None
    model, state = weights_of(file, about["dropout"])
    if to == "own":
        config = {"config": file.content["config"]} if "config" in file.content else {}
        contents = {target: saved({**about, **config, "model": state})}
    elif to == "official":
        names, note = official(model, about)
        content = {"arch": about["architecture"]["arch"], **about, "state_dict": renamed(state, names)}
        # The official release is for PyTorch 1.0, which does not read zip files.
        contents = {target: saved(content, _use_new_zipfile_serialization=False)}
    elif to == "timm":
        arch, names, note = timm(model, about)
        contents = {target: saved({"arch": arch, **about, "state_dict": renamed(state, names)})}
    else:
        card = model_card(target.name, model, about).encode()
        contents = {target: as_safetensors(state, about), target.with_name(CARD): card}
    notes = [*filter(None, [left_out(file, about, to), note])]
    if guessed := len(state) - len(file.weights.state):
        notes.append(f"{guessed} counters of batches, which {file.weights.path} does not have, are 0")
    return contents, notes


def main(
    source: Path,
    target: Path,
    to: Form = "own",
    network: CheckpointOptions = SAYS_ALL,
    force: bool = False,
) -> None:
    """Convert the weights of a model to another form.

    Args:
        source: a checkpoint in any form, or the output folder of a run, whose best is taken.
        target: the file to write.
        to: its form.
        network: what the source does not say.
        force: write over what is there.
    """
    try:
        file = read_model_file(source, **network.arguments)
        check_target(file.weights.path, target, to, force)
        contents, notes = convert(file, target, to)
        with whole_files(*contents) as files:
            for each, content in zip(files, contents.values(), strict=True):
                each.write_bytes(content)
    except (CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    for line in [*notes, f"wrote {' and '.join(map(str, contents))}"]:
        print(line)


if __name__ == "__main__":
    parse(main)
