"""What pyproject.toml can't say: all packages of a wheel, and the libraries that `make wheel` compiles for it.

With DCD_PREBUILT=1 the wheel holds the decoder compiled and, on x86-64, the dynamic layers' kernels for CPUs: it is for
machines of this kind, with any Python. Without, it is for all machines, and they are compiled at their first use.
"""

import os
import platform
import runpy
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))  # which isolated builds leave out

from pipelines import native_library

ROOMS = ["pipelines", "training", "tools"]
IS_PREBUILT = os.environ.get("DCD_PREBUILT") == "1"


class BuildWithLibraries(build_py):
    def run(self) -> None:
        super().run()
        if IS_PREBUILT and not self.editable_mode:
            folder = Path(self.build_lib, "dcd", "app", "pipelines", native_library.FOLDER.name)
            native_library.compile_library(folder / native_library.PREBUILT.name, native_library.BASELINE)
            if platform.machine() == "x86_64":  # by its path: `import dcd` needs torch, which is not here
                avx512 = runpy.run_path(str(Path(__file__).parent / "dcd" / "ops" / "avx512_library.py"))
                avx512["compile_library"](Path(self.build_lib, "dcd", "native", avx512["PREBUILT"].name))


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
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": WheelOfAnyPython},
)
