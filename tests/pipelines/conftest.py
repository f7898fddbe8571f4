"""Photographs in a folder and in .beton files, every backend that reads them, and loaders that are closed."""

import pytest

from pipelines.build import build_loader
from pipelines.config import DataConfig
from tests.pipelines.helpers import EXECUTORS, Photos, config_of, converted, write_photos


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Photos:
    root = tmp_path_factory.mktemp("photos")
    write_photos(root / "folder")
    verbatim = converted(root / "folder", root / "verbatim")
    half_raw = converted(root / "folder", root / "half_raw", mode="reencode", quality=95, jpeg_fraction=0.5)
    return Photos(root / "folder", verbatim, half_raw)


@pytest.fixture(params=EXECUTORS)
def small(request, photos) -> DataConfig:
    """`config_of` every executor."""
    return config_of(request.param, photos)


@pytest.fixture
def build():
    """`build_loader`, whose loaders are closed at the end of the test."""
    loaders = []

    def build(*args, **kwargs):
        loaders.append(build_loader(*args, **kwargs))
        return loaders[-1]

    yield build
    for loader in loaders:
        loader.close()
