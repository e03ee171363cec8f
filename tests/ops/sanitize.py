"""`make sanitize`: builds _C with the address and undefined-behaviour sanitizers and runs tests of it.

torch's tensors come from the sanitizer's allocator, with poisoned memory around each. The build lies beside links to
the Python files of the package, in build/sanitize.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
TESTS = ("ops/test_isa.py", "ops/test_arguments.py", "profile/test_rings.py", "profile/test_spans.py")
SEARCH = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))


def build() -> None:
    package = BUILD / "package" / "inferix_kernels"
    package.mkdir(parents=True, exist_ok=True)
    for path in (ROOT / "inferix_kernels").iterdir():
        link = package / path.name
        if path.suffix != ".so" and path.name != "__pycache__" and not link.exists():
            link.symlink_to(path)
    options = {
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": package,
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "Python_EXECUTABLE": sys.executable,
        "INFERIX_SANITIZE": "ON",
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    environment = os.environ | {"PATH": SEARCH}
    configure = ["cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *definitions]
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        subprocess.run(command, check=True, env=environment)


def runtime() -> str:
    """Libraries to load before Python: the sanitizer, and the C++ runtime, whose exceptions it looks for at once."""
    compiler = os.environ.get("CXX", "g++")
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        command = [compiler, f"-print-file-name={name}"]
        paths.append(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    return " ".join(paths)


def main() -> int:
    build()
    environment = os.environ | {
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch never free all they have
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # Python's own allocator would hide what is wrong with its objects
        "PYTHONPATH": str(BUILD / "package"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", f"pythonpath={BUILD / 'package'}"]
    return subprocess.run([*command, *(f"tests/{name}" for name in TESTS)], cwd=ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
