"""Builds inferix_kernels._C and _spans with CMake; CMakeLists.txt says of what, pyproject.toml has the metadata."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ARCHITECTURES = {"80": "80", "90a": "90a-real"}  # as --cuda-architectures takes them, and as CMake does
# cmake and ninja installed by pip lie beside python, which need not be on PATH.
SEARCH = os.pathsep.join((sysconfig.get_path("scripts"), os.environ.get("PATH", "")))


def find(what: str, *names: str, remedy: str) -> str:
    for name in names:
        if path := shutil.which(name, path=SEARCH):
            return path
    raise SystemExit(f"inferix: no {what} found (looked for {', '.join(names)}): {remedy}")


def compiler_names() -> list[str]:
    return os.environ.get("CXX", "").split()[:1] or ["c++", "g++", "clang++"]


class CMakeBuild(build_ext):
    user_options: ClassVar = [
        *build_ext.user_options,
        ("cuda-architectures=", None, "build the CUDA kernels for these alone: 80, 90a or 80;90a (default: both)"),
    ]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.cuda_architectures: str | None = None

    def finalize_options(self) -> None:
        super().finalize_options()
        wanted = (self.cuda_architectures or ";".join(ARCHITECTURES)).split(";")
        if unknown := [name for name in wanted if name not in ARCHITECTURES]:
            raise SystemExit(f"inferix: --cuda-architectures must be of {', '.join(ARCHITECTURES)}, got {unknown[0]!r}")
        # "80" holds PTX too, which GPUs later than Hopper compile when they first load it.
        self.cuda_architectures = ";".join(ARCHITECTURES[name] for name in wanted)

    def build_extension(self, ext: Extension) -> None:
        if ext is not self.extensions[0]:  # CMake builds both at once
            return
        find("C++ compiler", *compiler_names(), remedy="install one (on Debian: apt install g++)")
        cmake = find("cmake", "cmake", remedy="pip install cmake")
        ninja = find("ninja", "ninja", "ninja-build", remedy="pip install ninja")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            raise SystemExit("inferix: no Python.h found: install it (on Debian: apt install python3-dev)")
        import pybind11  # needed to build, not to install from a wheel

        nvcc = shutil.which("nvcc")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": ninja,  # the cached one may have gone with the environment of an earlier build
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name)).resolve().parent,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "Python_EXECUTABLE": sys.executable,
            "INFERIX_CUDA": "ON" if nvcc else "OFF",
            "INFERIX_CUDA_ARCHITECTURES": self.cuda_architectures,
        }
        build = Path(self.build_temp).resolve()
        print(f"inferix: building the C++ kernels {f'and the CUDA kernels ({nvcc})' if nvcc else '(no nvcc on PATH)'}")
        definitions = [f"-D{name}={value}" for name, value in options.items()]
        self.step([cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", *definitions], nvcc)
        jobs = ["--parallel", str(self.parallel)] if self.parallel else []  # else as many as there are cores
        self.step([cmake, "--build", str(build), *jobs], nvcc)

    def step(self, command: list[str], nvcc: str | None) -> None:
        if subprocess.run(command).returncode:
            hint = f"; to build without CUDA, take {Path(nvcc).parent} off PATH" if nvcc else ""
            raise SystemExit(f"inferix: the build of inferix_kernels._C failed, see above{hint}")


setup(
    packages=[*find_packages(include=["inferix_kernels*"]), *find_packages("python")],
    package_dir={"inferix": "python/inferix"},
    ext_modules=[Extension("inferix_kernels._C", []), Extension("inferix_kernels._spans", [])],
    cmdclass={"build_ext": CMakeBuild},
)
