"""Which datasets are told apart, and which are not."""

import shutil

import numpy as np
import pytest
from PIL import Image

from pipelines.fingerprint import fingerprint
from pipelines.sources.beton import BetonSource
from pipelines.sources.folder import FolderSource
from pipelines.sources.synthetic import SyntheticSource
from tests.pipelines.helpers import converted


def of_folder(root):
    return fingerprint(FolderSource(root / "train"))


def of_beton(root):
    return fingerprint(BetonSource(root / "train.beton"))


@pytest.fixture
def few(photos, tmp_path):
    """A folder of its own of all photographs."""
    return shutil.copytree(photos.folder, tmp_path / "few")


def test_the_same_images_in_a_folder_and_in_beton_files(photos):
    folder, beton = of_folder(photos.folder), of_beton(photos.verbatim)
    assert {what for what in folder if folder[what] == beton.get(what)} == {"number", "labels", "sizes"}
    assert set(folder) ^ set(beton) == {"names of files", "bytes"} and folder["number"] == "12"


def test_another_place_and_another_conversion_of_the_same(photos, few, tmp_path):
    assert of_folder(few) == of_folder(photos.folder)
    assert of_beton(converted(few, tmp_path / "again")) == of_beton(photos.verbatim)
    moved = shutil.copytree(photos.verbatim, tmp_path / "moved")
    assert of_beton(moved) == of_beton(photos.verbatim)
    (moved / "dataset.json").unlink()  # as FFCV's own writer leaves it
    assert of_beton(moved) == {key: value for key, value in of_beton(photos.verbatim).items() if key != "bytes"}


def differing(found, expected):
    assert found.keys() == expected.keys()
    return {what for what in found if found[what] != expected[what]}


def test_an_image_less(photos, few):
    victim = sorted((few / "train").rglob("*.JPEG"))[7]
    victim.unlink()
    assert "number" in differing(of_folder(few), of_folder(photos.folder))


def test_an_image_of_another_name_class_or_size(photos, few):
    (image, *_), (other, *_) = (sorted(folder.iterdir()) for folder in sorted((few / "train").iterdir()))
    image.rename(image.with_name("00.JPEG"))
    assert differing(of_folder(few), of_folder(photos.folder)) == {"names of files"}
    image.with_name("00.JPEG").rename(other.with_name("00.JPEG"))
    assert differing(of_folder(few), of_folder(photos.folder)) == {"names of files", "labels", "sizes"}


def test_other_pixels_of_the_same_size_in_beton_files(photos, few, tmp_path):
    victim = sorted((few / "train").rglob("*.JPEG"))[7]
    with Image.open(victim) as image:
        Image.fromarray(255 - np.asarray(image)).save(victim)
    assert differing(of_folder(few), of_folder(photos.folder)) == set()  # nobody has read them
    assert differing(of_beton(converted(few, tmp_path / "out")), of_beton(photos.verbatim)) == {"bytes"}


def test_another_recipe_makes_other_sizes(photos):
    assert differing(of_beton(photos.half_raw), of_beton(photos.verbatim)) == {"sizes", "bytes"}


def test_no_images_at_all():
    assert fingerprint(SyntheticSource(8, 2)) == fingerprint(SyntheticSource(8, 2))
    assert differing(fingerprint(SyntheticSource(8, 2)), fingerprint(SyntheticSource(9, 2))) == {
        "number",
        "labels",
        "sizes",
    }
