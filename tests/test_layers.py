"""Holds docs/design/architecture.md, "Who may import whom", by reading the imports of every source file."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOOR = ["checks", "transfer", "searches", "states", "spec", "runtime", "ops", "integrators", "esnr", "physics", "data", "metrics"]
FLOOR += ["stochastic_sampling", "core", "adapters", "models"]
ORDER = [*FLOOR, "rewards", "ttc", "evaluation", "front_door", "report", "experiments", "cli"]
MAY_IMPORT = {layer: set(ORDER[: i + 1]) for i, layer in enumerate(ORDER)}
MAY_IMPORT["pwm"] = {"checks", "transfer", "searches", "states", "spec", "runtime", "ops", "integrators", "esnr", "data", "pwm"}
for outer in ("front_door", "report", "experiments", "cli"):
    MAY_IMPORT[outer] |= {"pwm"}
MAY_IMPORT["cli"] |= {"configs"}


def sources(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if path.parts[len(ROOT.parts) :][:2] != ("ttcfast", "kernels")]  # a link to kernels/


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str:
    """``ttcfast.core.base_fm`` -> ``core``; the package itself -> ``""``."""
    return module.split(".")[1] if "." in module else ""


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path, tree: ast.AST | None = None) -> Iterator[tuple[int, str]]:
    """Line and full module name of everything the file imports, inside functions too, and by ``import_module("...")``."""
    yield from _imports(path, tree) if tree is not None else all_imports(path)


@functools.cache
def all_imports(path: Path) -> list[tuple[int, str]]:
    return list(_imports(path, parsed(path)))


def _imports(path: Path, tree: ast.AST) -> Iterator[tuple[int, str]]:
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str))


def of_package(module: str) -> bool:
    return module == "ttcfast" or module.startswith("ttcfast.")


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("import ttcfast.ttc.inference", "ttcfast.ttc.inference"),
        ("from ttcfast import ARMScorer", "ttcfast.ARMScorer"),
        ("from ..rewards.common import Scorer", "ttcfast.rewards.common.Scorer"),
        ("from . import seeds", "ttcfast.core.seeds"),
        ("def f():\n    from .. import cli", "ttcfast.cli"),
        ("importlib.import_module('ttcfast.kernels.arm')", "ttcfast.kernels.arm"),
    ],
)
def test_every_way_to_import_is_seen(line, module):
    assert [found for _, found in imports(ROOT / "ttcfast" / "core" / "base_fm.py", ast.parse(line))] == [module]


def test_every_part_of_the_package_has_its_place_in_the_order():
    parts = {path.stem if path.suffix == ".py" else path.name for path in (ROOT / "ttcfast").iterdir() if path.suffix in ("", ".py")}
    parts = {part for part in parts if not part.startswith(("_", "."))}
    assert parts <= {*MAY_IMPORT, "kernels", "configs"}


@pytest.mark.parametrize("layer", sorted(MAY_IMPORT))
def test_a_layer_imports_only_what_stands_to_its_left(layer):
    wrong = []
    for path in sources("ttcfast"):
        if layer_of(name_of(path)) != layer:
            continue
        for line, module in imports(path):
            if not of_package(module) or layer_of(module) in ("_C", "kernels"):
                continue
            # A short name of the package (`from ttcfast import X`) hides the layer it comes from; only its version has none.
            if layer_of(module) not in MAY_IMPORT[layer] and module != "ttcfast.__version__":
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong


@functools.cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in sources("ttcfast")}


def imported_at_load(path: Path) -> Iterator[str]:
    """Modules of the package that a file imports when it is loaded or called, doors (``__init__``) counted as what they are."""
    known = modules()
    tree = parsed(path)
    typing_only = {
        id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }  # fmt: skip
    for node in ast.walk(tree):
        if id(node) in typing_only or not isinstance(node, (ast.Import, ast.ImportFrom, ast.Call)):
            continue
        for _, module in imports(path, ast.Module([node if isinstance(node, ast.stmt) else ast.Expr(node)], [])):
            if of_package(module):
                yield module if module in known else module.rpartition(".")[0]


def test_no_circles_between_files():
    """Names that a package keeps for those who imported them there (its module's ``__getattr__``) are doors that nobody inside uses."""
    edges = {name: {m for m in imported_at_load(path) if m != name} for name, path in modules().items()}
    reached: dict[str, set[str]] = {}
    for name in edges:
        seen, rest = set(), list(edges[name])
        while rest:
            if (here := rest.pop()) not in seen:
                seen.add(here)
                rest += edges.get(here, ())
        reached[name] = seen
    circles = sorted({tuple(sorted(b for b in reached[a] if a in reached.get(b, ()))) for a in reached if a in reached[a]})
    assert not circles, "\n".join(" <-> ".join(circle) for circle in circles)


def test_nobody_imports_what_stands_above_the_evaluation_but_what_does_too():
    outer = ("report", "experiments", "cli")
    found = {
        (layer_of(name_of(path)), layer_of(module))
        for path in sources("ttcfast", "bench")
        for _, module in imports(path)
        if of_package(module) and layer_of(module) in outer
    }
    assert found <= {(a, b) for i, a in enumerate(outer) for b in outer[: i + 1]}


def test_kernels_import_torch_triton_and_their_siblings_alone():
    wrong = []
    for path in sources("kernels"):
        for line, module in imports(path):
            top = module.split(".")[0]
            if top not in ("torch", "triton", "kernels", "__future__", *sys.stdlib_module_names):
                wrong.append(f"{path.name}:{line} imports {module}")
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Import):
                wrong += [f"{path.name}:{node.lineno}: write a relative import" for a in node.names if a.name.split(".")[0] == "kernels"]
            if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "kernels":
                wrong.append(f"{path.name}:{node.lineno}: write a relative import")
    assert not wrong


def test_ops_is_the_only_door_to_the_kernels_and_opens_it_lazily():
    for path in sources("ttcfast"):
        found = [(line, module) for line, module in imports(path) if module.startswith("ttcfast.kernels")]
        if not found:
            continue
        assert layer_of(name_of(path)) == "ops", f"{path.relative_to(ROOT)} imports {found}"
        top_level = [module for node in parsed(path).body for _, module in imports(path, node) if is_import(node)]
        assert not [module for module in top_level if module.startswith("ttcfast.kernels")], f"{path.name} imports kernels at its top"


def is_import(node: ast.AST) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def test_the_native_module_is_imported_in_one_file():
    found = {path.relative_to(ROOT) for path in sources("ttcfast", "bench") for _, module in imports(path) if layer_of(module) == "_C"}
    assert len(found) <= 1 and all(path.parts[:2] == ("ttcfast", "ops") for path in found), found


def test_operations_need_no_configuration_framework_and_no_simulator():
    for path in [ROOT / "ttcfast" / "spec.py", *sources("kernels", "ttcfast/ops", "bench", "tests/ops")]:
        tops = {module.split(".")[0] for _, module in imports(path)}
        assert not tops & {"hydra", "omegaconf", "dm_control", "mujoco"}, path


def test_hydra_stays_in_the_command_line():
    found = {
        layer_of(name_of(path))
        for path in sources("ttcfast")
        for _, module in imports(path)
        if module.split(".")[0] in ("hydra", "omegaconf")
    }
    assert found <= {"cli"}


def test_no_file_is_opened_that_could_run_code():
    for path in sources("ttcfast", "bench"):
        tree = parsed(path)
        assert not {module.split(".")[0] for _, module in imports(path, tree)} & {"pickle", "dill", "cloudpickle", "joblib"}, path
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = [k for k in node.keywords if k.arg == "weights_only" and ast.unparse(k.value) == "True"]
                assert safe, f"{path.relative_to(ROOT)}:{node.lineno} calls torch.load without weights_only=True"


def test_only_commands_and_reports_print():
    for path in sources("ttcfast"):
        if layer_of(name_of(path)) in ("cli", "report", "experiments"):
            continue
        calls = [n.lineno for n in ast.walk(parsed(path)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "print"]
        assert not calls, f"{path.relative_to(ROOT)}:{calls[0]} prints; use warnings or logging"


def test_importing_the_package_adds_at_most_0_3_s_to_importing_torch():
    code = "import time, torch\nstart = time.process_time()\nimport ttcfast\nassert time.process_time() - start < 0.3"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
