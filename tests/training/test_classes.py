"""Classes are compared by name; where names are missing, what is assumed is said."""

import re

import pytest

from dcd.checkpoint_file import CheckpointError
from training.classes import Classes, check_same, fits_classifier, match_by_name

PETS = Classes(3, ["cat", "dog", "hen"])
UNNAMED = Classes(3)
IMAGENET = Classes(1000, [f"n{number:08d}" for number in range(1000)])
WORDS = Classes(1000, ["tench", *IMAGENET.names[1:]])
ORDER = "p.pth does not name its classes: ImageNet's order, of sorted WordNet IDs, is assumed"


@pytest.mark.parametrize(
    ("model", "data", "outputs", "note"),
    [
        (PETS, PETS, [0, 1, 2], None),
        (PETS, Classes(2, ["dog", "hen"]), [1, 2], "evaluating on 2 of the 3 classes of p.pth"),
        (PETS, Classes(3, ["hen", "cat", "dog"]), [2, 0, 1], None),
        (Classes(9, PETS.names), PETS, [0, 1, 2], None),  # --num-classes
        (UNNAMED, PETS, [0, 1, 2], "p.pth does not name its classes: their order is assumed to be that of the data"),
        (PETS, UNNAMED, [0, 1, 2], "the data does not name its classes: their order is assumed to be that of p.pth"),
        (Classes(1000), IMAGENET, list(range(1000)), ORDER),
        (Classes(1000), Classes(1000), list(range(1000)), ORDER),
        (Classes(1000), WORDS, list(range(1000)), f"{ORDER}, though the data's are called tench"),
    ],
)
def test_evaluation(model, data, outputs, note):
    assert match_by_name("p.pth", model, data) == (outputs, note)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            PETS,
            Classes(2, ["cow", "dog"]),
            "does not know all classes of the data: cow are not among its cat, dog, hen;",
        ),
        (PETS, IMAGENET, "n00000000, n00000001, n00000002 and 997 more are not among"),
        (UNNAMED, Classes(2, ["dog", "hen"]), "has 3 classes, the data 2, and the checkpoint does not name them: only"),
        (PETS, Classes(2), "has 3 classes, the data 2, and the data does not name them"),
        (UNNAMED, IMAGENET, "has 3 classes, the data 1000, and the checkpoint"),
    ],
)
def test_evaluation_of_what_the_model_does_not_know(model, data, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        match_by_name("p.pth", model, data)


@pytest.mark.parametrize(
    ("theirs", "ours", "fits", "note"),
    [
        (PETS, PETS, True, None),
        (UNNAMED, PETS, True, "p.pth does not name its classes: their order is assumed"),
        (Classes(1000), IMAGENET, True, ORDER),
        (Classes(1000), PETS, False, "p.pth: all but the classifier is loaded (1000 classes there, 3 here)"),
        (PETS, Classes(3, ["cat", "dog", "pig"]), False, "is loaded (only there: hen; only here: pig)"),
        (PETS, Classes(3, ["hen", "cat", "dog"]), False, "is loaded (in another order)"),
    ],
)
def test_a_classifier_for_training(theirs, ours, fits, note):
    found, said = fits_classifier("p.pth", theirs, ours)
    assert found == fits and (said is None if note is None else note in said)


def test_going_on():
    assert check_same(PETS, PETS) is None and check_same(UNNAMED, UNNAMED) is None
    assert "the checkpoint does not name its classes" in check_same(UNNAMED, PETS)  # of an earlier release
    with pytest.raises(
        CheckpointError, match="is of other classes .only there: hen; only here: pig.: use the same data"
    ):
        check_same(PETS, Classes(3, ["cat", "dog", "pig"]))
