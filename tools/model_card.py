"""The card of a model: a README.md with the front matter of Hugging Face, to lie beside the weights."""

from typing import Any

from torch import nn

import dcd

# Where weights come from: (license in the front matter, what the card says of it). What the user must decide is left
# to be filled in.
FILL_IN = "# license: fill in whose weights these are and how they may be used"
ORIGINS = {
    "official": (
        "license: other\nlicense_name: education-research-non-profit",
        "The weights are those of the official DCD release, converted. Its license, by The Regents of the "
        "University of California, allows **education, research and non-profit purposes only**, and must go with every "
        "copy.",
    ),
    "run": (FILL_IN, "The weights were trained by dcd-trainer from scratch."),
    "fine-tuned": (
        FILL_IN,
        "The weights were trained by dcd-trainer, beginning with those of another checkpoint, whose terms may hold for "
        "them too: official DCD checkpoints are for education, research and non-profit use only.",
    ),
    None: (FILL_IN, "Where the weights come from is not known: their file did not say."),
}


def model_card(file_name: str, model: nn.Module, about: dict[str, Any]) -> str:
    """The text of the card.

    Args:
        file_name: of the weights. model: of their shapes.
        about: what the file says of itself, by the keys of `tools.convert_checkpoint`.
    """
    architecture = about["architecture"]
    license_, origin = ORIGINS.get(about["origin"], ORIGINS[None])
    options = "".join(
        f", {name} {value:g}" for name, value in architecture.items() if name not in ("arch", "num_classes")
    )
    rows = {
        "architecture": f"`{architecture['arch']}`{options}",
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "classes": f"{architecture['num_classes']:,}, {_names(about.get('classes'))}",
        "preprocessing": _preprocessing(about.get("preprocessing")),
    }
    if "best_top1" in about:
        rows["top-1"] = f"{about['best_top1']:.2f} % in the evaluation of its run after epoch {about['best_epoch'] + 1}"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{license_}
pipeline_tag: image-classification
tags:
- image-classification
- dcd
---

# {architecture["arch"]}

{_kind(architecture["arch"])}

| | |
|---|---|
{table}

## Load

```python
import dcd  # dcd-trainer
model = dcd.load("{file_name}")
logits = model(model.preprocessing(image)[None])  # image: (3, height, width), uint8, RGB
```

## Origin and terms

{origin}
"""


def _kind(arch: str) -> str:
    if arch.endswith("_dcd"):
        return (
            "Dynamic convolution decomposition (DCD, ICLR 2021, [arXiv 2103.08756](https://arxiv.org/abs/2103.08756))."
        )
    return "Trained for image classification."


def _names(classes: list[str] | None) -> str:
    return "named in the file" if classes else "which the file does not name"


def _preprocessing(described: dict[str, Any] | None) -> str:
    of = dcd.Preprocessing.from_dict(described) if described else dcd.Preprocessing()
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (of.mean, of.std))
    flipped = "; the mean of the logits of this and its mirror image" if of.flip else ""
    unsaid = "" if described else " (the usual one: the source did not say)"
    return (
        f"the square in the middle with {of.crop:.4g} of the shorter side, resized to {of.size} × {of.size}; RGB in "
        f"[0, 1] minus ({mean}), divided by ({std}){flipped}{unsaid}"
    )
