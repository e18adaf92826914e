"""Builds ttcfast._C by CMake; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Configures and builds CMakeLists.txt, and puts the module where setuptools expects it.

    Environment: ``TTCFAST_CUDA`` (AUTO, ON, OFF) and ``CMAKE_ARGS`` (further arguments, split as a shell would).
    """

    def build_extension(self, ext: Extension) -> None:
        if not has_compiler():
            self.warn(
                "no C++ compiler was found (CXX, c++, g++, clang++, cl): ttcfast is installed without its compiled extension, "
                "and the 'cpu' backend will say so; install a C++17 compiler and reinstall to have it"
            )
            return
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        configure = ["-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}", f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY_RELEASE={target.parent}"]
        configure += [f"-Dpybind11_DIR={pybind11_folder()}", f"-DTTCFAST_CUDA={os.environ.get('TTCFAST_CUDA', 'AUTO')}"]
        ninja = tool("ninja", "BIN_DIR")
        if ninja and "CMAKE_GENERATOR" not in os.environ:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        self.run_cmake(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")))
        self.run_cmake(["--build", str(build), "--config", "Release", "--parallel", str(os.cpu_count() or 1)])

    def copy_extensions_to_source(self) -> None:
        """As setuptools does for an editable install, but without failing over an extension that was not built."""
        self.extensions = [ext for ext in self.extensions if Path(self.get_ext_fullpath_built(ext)).exists()]
        super().copy_extensions_to_source()

    def get_ext_fullpath_built(self, ext: Extension) -> str:
        return str(Path(self.build_lib) / self.get_ext_filename(self.get_ext_fullname(ext.name)))

    def run_cmake(self, arguments: list[str]) -> None:
        command = [tool("cmake", "CMAKE_BIN_DIR") or "cmake", *arguments]
        try:
            subprocess.run(command, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(
                f"the extension ttcfast._C did not build ({error}). The compiler's messages stand above (pip install -v shows them). "
                "It needs CMake >= 3.26 and a C++17 compiler; TTCFAST_CUDA=OFF leaves CUDA out"
            ) from error


def has_compiler() -> bool:
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = chosen[:1] or ["c++", "g++", "clang++", "cl"]
    return os.name == "nt" or any(shutil.which(name) for name in names)


def tool(name: str, folder: str) -> str | None:
    """The program of the build requirement of that name, which may be newer than the one on PATH; else the one on PATH."""
    try:
        found = shutil.which(name, path=getattr(import_module(name), folder))
    except (ImportError, AttributeError):
        found = None
    return found or shutil.which(name)


def pybind11_folder() -> str:
    import pybind11

    return pybind11.get_cmake_dir()


setup(
    packages=[*find_packages(include=["ttcfast", "ttcfast.*"], exclude=["ttcfast.kernels"]), "ttcfast.kernels"],
    package_dir={"ttcfast.kernels": "kernels"},
    package_data={"ttcfast": ["py.typed", "configs/**/*.yaml", "report/public_returns.csv", "report/page/page.css", "report/page/page.js"]},
    ext_modules=[
        Extension("ttcfast._C", sources=[], depends=["CMakeLists.txt", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*"))])
    ],
    cmdclass={"build_ext": CMakeBuild},
)
