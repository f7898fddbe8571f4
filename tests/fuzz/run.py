"""Fuzz the readers of foreign files: `native.cpp` for JPEGs and raw images, `BetonSource` for .beton files.

    python -m tests.fuzz.run --seconds 60

For three quarters of the time libFuzzer tests the first, with AddressSanitizer and UBSan; then the second is tested. A
file that fails is kept in FOLDER/findings (a .beton file in FOLDER/betons), and the exit code is 1. A later run goes on
from the inputs that this one has kept in FOLDER/corpus.
"""

import shutil
import subprocess
import sys
import traceback
from pathlib import Path

from tests.fuzz import betons
from tests.fuzz.inputs import seeds
from training.command_line import parse

SOURCE = Path(__file__).with_name("native_input.cpp")
FLAGS = ["-std=c++17", "-O1", "-g", "-pthread"]
FLAGS += ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined"]
PACKAGES = "clang libclang-rt-14-dev"  # by Debian 12's names


def build(folder: Path) -> Path:
    """Compile the fuzzer of native.cpp. Returns its path."""
    if shutil.which("clang++") is None:
        sys.exit(f"error: no clang++, whose libFuzzer this needs: apt-get install {PACKAGES}")
    program = folder / "native_input"
    command = ["clang++", *FLAGS, SOURCE, "-o", program, "-ljpeg"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: cannot compile {SOURCE}: apt-get install {PACKAGES} libjpeg-dev\n{done.stderr}")
    return program


def fuzz_native(folder: Path, seconds: int) -> int:
    """Run libFuzzer; each input may take 10 s and 2 GiB. Returns its exit code: 0 if it has found nothing."""
    program = build(folder)
    corpus, findings = folder / "corpus", folder / "findings"
    corpus.mkdir(exist_ok=True), findings.mkdir(exist_ok=True)
    for name, data in seeds().items():
        (corpus / name).write_bytes(data)
    limits = [f"-max_total_time={seconds}", "-timeout=10", "-rss_limit_mb=2048", "-max_len=16384"]
    output = ["-print_final_stats=1", "-verbosity=0", f"-artifact_prefix={findings}/"]
    return subprocess.run([program, *limits, *output, corpus]).returncode


def main(seconds: int = 60, folder: Path = Path("out/fuzz")) -> None:
    """Fuzz the decoder and the reader of .beton files.

    Args:
        seconds: how long, at least 4.
        folder: for the program, the corpus and the files that fail.
    """
    (folder / "betons").mkdir(parents=True, exist_ok=True)
    code = fuzz_native(folder, seconds * 3 // 4)
    if code:
        sys.exit(f"error: found a file that breaks native.cpp: {folder / 'findings'}")
    try:
        count, opened = betons.fuzz(folder / "betons", seconds // 4)
    except Exception:
        traceback.print_exc()
        sys.exit(f"error: found a file that breaks BetonSource: {folder / 'betons'}")
    print(f"{count:,} .beton files, of which {opened:,} opened")


if __name__ == "__main__":
    parse(main)
