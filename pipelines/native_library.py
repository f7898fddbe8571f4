"""The library of `native/native.cpp`: the one that a wheel brings along, or one that is compiled on this machine.

It is compiled at its first use, with the machine's own instructions, and kept under `$XDG_CACHE_HOME/dcd`
(`~/.cache/dcd`) for every later start. This needs a C++ compiler and libjpeg-turbo's header. A wheel's library is for
x86-64 processors with AVX2 (Intel's since 2013, AMD's since 2015); `DCD_PREBUILT=0` has one compiled all the same.
`setup.py` imports this module, too, in an environment that has nothing but Python.
"""

import ctypes
import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

from pipelines.cache import cache_folder
from pipelines.sources.errors import DataError

FOLDER = Path(__file__).with_name("native")
SOURCE = FOLDER / "native.cpp"
PREBUILT = FOLDER / "native.so"  # in a wheel of `make wheel`
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread")
OWN = "-march=native"  # for the machine that compiles
PACKAGES = "g++ libjpeg-dev"  # by Debian's and Ubuntu's names
# What a wheel's library is compiled for, and the features that it then needs, by their names in /proc/cpuinfo.
BASELINE, NEEDED = "-mtune=generic", set()
if platform.machine() == "x86_64":
    BASELINE, NEEDED = "-march=x86-64-v3", {"avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}


def load_library() -> ctypes.CDLL:
    """The library, compiled now unless there is one that fits this machine.

    Raises:
        DataError: it can't be compiled; the message names the packages for it.
    """
    if PREBUILT.exists() and os.environ.get("DCD_PREBUILT") != "0":
        missing = NEEDED - set(_features().split())
        reason = f"this processor has no {', '.join(sorted(missing))}"
        if not missing:
            try:
                return ctypes.CDLL(str(PREBUILT))
            except OSError as error:  # of another kind of machine, or what it is linked to is not there
                reason = str(error)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"note: the installed decoder does not fit ({reason}): one is compiled", file=sys.stderr)
    return ctypes.CDLL(str(_compiled()))


def compile_library(library: Path, processor_flag: str) -> None:
    """Compile `native.cpp` into `library`.

    Args:
        processor_flag: `OWN` or `BASELINE`.

    Raises:
        DataError: there is no compiler, or no header of libjpeg-turbo.
    """
    command = [_compiler(), *FLAGS, processor_flag, str(SOURCE), "-o", str(library), "-ljpeg"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
    except OSError as error:
        done, reason = None, str(error)
    if done is None or done.returncode:
        raise DataError(f"cannot compile {SOURCE} ({reason}): apt-get install {PACKAGES}")


def _compiled() -> Path:
    """The path of the library for this machine; it is compiled now unless an earlier start has done so."""
    headers = sorted(FOLDER.glob("*.h"))
    key = hashlib.sha256(SOURCE.read_bytes() + b"".join(header.read_bytes() for header in headers))
    for part in (_compiler(), *FLAGS, OWN, platform.machine(), _features()):
        key.update(f"\0{part}".encode())
    library = cache_folder() / f"native-{key.hexdigest()[:16]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(f".{os.getpid()}.tmp")  # renamed when whole: other ranks may compile it, too
        compile_library(temporary, OWN)
        temporary.rename(library)
    return library


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _features() -> str:
    """What the processor can do, on which -march=native depends: machines that differ may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
