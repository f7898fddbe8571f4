#!/usr/bin/env bash
# Look for what compiles FFCV and pipelines/native/native.cpp, and for a browser, in which a test looks at a page of
# tools.report; root installs what is missing, others are told how to.
#
#     tools/system_packages.sh PYTHON    # the interpreter that .venv is made of
set -u
python=$1
compiler=${CXX:-g++}
export DEBIAN_FRONTEND=noninteractive

# The missing packages, by the names that Debian and Ubuntu give them.
missing() {
    command -v "$compiler" >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    pkg-config --exists opencv4 2>/dev/null || echo libopencv-dev
    pkg-config --exists libturbojpeg 2>/dev/null || echo libturbojpeg0-dev
    printf '#include <%s>\n' cstdio jpeglib.h | "$compiler" -fsyntax-only -x c++ - 2>/dev/null || echo libjpeg-dev
    "$python" - <<'END'
import os, sys, sysconfig
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python%d.%d-dev" % sys.version_info[:2])
END
}

can_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

mapfile -t packages < <(missing)
if [ ${#packages[@]} -gt 0 ] && can_install; then
    apt-get update && apt-get install -y --no-install-recommends "${packages[@]}"
    mapfile -t packages < <(missing)
fi
if [ ${#packages[@]} -gt 0 ]; then
    echo "FFCV cannot be compiled here: sudo apt-get install ${packages[*]}" >&2
    exit 1
fi

# About 300 MB. Everything else works without it, so it is by itself: not every distribution has it under this name.
if ! command -v chromium >/dev/null && can_install; then
    apt-get update && apt-get install -y --no-install-recommends chromium
fi
if ! command -v chromium >/dev/null; then
    echo "note: one test is skipped without chromium, which looks at a report: sudo apt-get install chromium" >&2
fi
