"""Which training images a run may go on with."""

import pytest

from dcd.checkpoint_file import CheckpointError
from training.same_data import check_same_data

PLAN = {"number": "1281167", "labels": "a", "sizes": "b"}


@pytest.mark.parametrize(
    ("saved", "ours"),
    [
        (PLAN, PLAN),
        ({**PLAN, "bytes": "c"}, {**PLAN, "names of files": "d"}),
        ({**PLAN, "bytes": "c"}, {**PLAN, "bytes": "c"}),
    ],
)
def test_the_same_as_far_as_both_know(saved, ours):
    assert check_same_data(saved, ours) is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"number": "1281166", "labels": "x"}, "(1,281,167 there, 1,281,166 here)"),
        ({"labels": "x", "sizes": "x"}, "(with other labels and sizes)"),
        ({"bytes": "x"}, "(with other bytes)"),
    ],
)
def test_others_are_refused_in_one_line(change, words):
    with pytest.raises(CheckpointError) as error:
        check_same_data({**PLAN, "bytes": "c"}, {**PLAN, "bytes": "c", **change})
    assert words in str(error.value) and "--weight" in str(error.value) and "\n" not in str(error.value)


def test_an_older_checkpoint_does_not_say():
    assert "does not say on which images" in check_same_data(None, PLAN)
