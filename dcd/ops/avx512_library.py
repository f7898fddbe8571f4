"""The library of `dcd/native`: the one that a wheel brings along, or one that is compiled at its first use.

It is for x86-64 processors with AVX-512 and its products of bf16 (AMD's since 2022, Intel's servers since 2023). The
compiled one is kept under `$XDG_CACHE_HOME/dcd` (`~/.cache/dcd`) for every later start; this needs g++ 11 or newer, and
is done anew at each start where there is no such folder to write to.
`DCD_AVX512=0` does without.
"""

import atexit
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "native"
SOURCE = FOLDER / "avx512.cpp"
PREBUILT = FOLDER / "avx512.so"  # in a wheel of `make wheel`
FEATURES = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512bf16", "fma", "bmi2")
FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-w", *(f"-m{name}" for name in FEATURES))


def has_library() -> bool:
    """Whether there is one for this processor."""
    return library() is not None


# torch.compile takes the answer as it is: `torch.compiler.assume_constant_result`, which would import the compiler.
has_library._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]: as PyTorch does


@lru_cache
def library() -> ctypes.CDLL | None:
    """The library, or None where the processor can't run it or, with a warning, where it can't be had."""
    import torch  # not at the head: setup.py reads this file where there is none

    able = torch.cpu.get_capabilities()
    needed = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16")
    if os.environ.get("DCD_AVX512") == "0" or not all(able.get(name, False) for name in needed):
        return None
    try:
        return ctypes.CDLL(str(PREBUILT if PREBUILT.exists() else _compiled()))
    except OSError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            warnings.warn(
                f"dynamic layers are slower than they need be: their kernels for this CPU cannot be had ({error}): "
                "apt-get install g++, or DCD_AVX512=0 for PyTorch's operations",
                stacklevel=2,
            )
        return None


def compile_library(library: Path) -> None:
    """Compile `avx512.cpp` into `library`.

    Raises:
        OSError: there is no compiler, or it fails.
    """
    # Not linked to an OpenMP of its own: it finds that of PyTorch, whose threads it shares.
    with tempfile.TemporaryDirectory() as folder:
        unlinked = f"{folder}/avx512.o"
        for step in ([*FLAGS, "-c", str(SOURCE), "-o", unlinked], ["-shared", unlinked, "-o", str(library)]):
            done = subprocess.run([_compiler(), *step], capture_output=True, text=True)
            if done.returncode:
                raise OSError(next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()))


def _compiled() -> Path:
    """The path of the library; it is compiled now unless an earlier start has done so."""
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(FOLDER.glob("*.[ch]*"))))
    key.update("\0".join((_compiler(), *FLAGS)).encode())
    library = _cache() / f"avx512-{key.hexdigest()[:16]}.so"
    if not library.exists():
        temporary = library.with_suffix(f".{os.getpid()}.tmp")  # renamed when whole: other ranks may compile it, too
        compile_library(temporary)
        temporary.rename(library)
    return library


def _cache() -> Path:
    """The folder of compiled libraries; where there is none to write to, one for this process, which it removes."""
    base, home = os.environ.get("XDG_CACHE_HOME"), os.path.expanduser("~")
    if not base and home not in ("~", "/"):
        base = os.path.join(home, ".cache")
    with suppress(OSError):
        if base:
            folder = Path(base, "dcd")
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK | os.X_OK):
                return folder
    folder = tempfile.mkdtemp(prefix="dcd-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compiler() -> str:
    return os.environ.get("CXX", "g++")
