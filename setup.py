"""What pyproject.toml can't say: all packages of a wheel, and the library that `make wheel` compiles for it.

With DCD_PREBUILT=1 the wheel holds `native.cpp` compiled: it is for machines of this kind, with any Python. Without,
it is for all machines, and the library is compiled at its first use.
"""

import os
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))  # which isolated builds leave out

from pipelines import native_library

ROOMS = ["pipelines", "training", "tools"]
IS_PREBUILT = os.environ.get("DCD_PREBUILT") == "1"


class BuildWithLibrary(build_py):
    def run(self) -> None:
        super().run()
        if IS_PREBUILT and not self.editable_mode:
            folder = Path(self.build_lib, "dcd", "app", "pipelines", native_library.FOLDER.name)
            native_library.compile_library(folder / native_library.PREBUILT.name, native_library.BASELINE)


class WheelOfAnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


class DistributionWithLibrary(Distribution):
    def has_ext_modules(self) -> bool:
        return IS_PREBUILT


packages = find_packages(include=["dcd", "dcd.*"])
packages += [f"dcd.app.{name}" for room in ROOMS for name in find_packages(include=[room, f"{room}.*"])]
setup(
    packages=packages,
    distclass=DistributionWithLibrary,
    cmdclass={"build_py": BuildWithLibrary, "bdist_wheel": WheelOfAnyPython},
)
