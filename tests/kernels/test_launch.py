"""Every Triton kernel is launched on the device of its tensors, whatever the current one is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

KERNELS = Path(__file__).resolve().parents[2] / "kernels"


def launches(tree: ast.AST) -> Iterator[int]:
    """Lines of what looks like Triton's ``kernel[grid](...)``, or of its ``run`` and ``warmup``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (
            isinstance(node.func, ast.Subscript) or (isinstance(node.func, ast.Attribute) and node.func.attr in ("run", "warmup"))
        ):
            yield node.lineno


@pytest.mark.parametrize("line", ["k[(1,)](x)", "grid = 1\nk[grid](x, A=1)", "f[lambda m: (1,)](x)", "k.run(x, grid=(1,))"])
def test_every_way_to_launch_is_seen(line):
    assert list(launches(ast.parse(line)))


def test_kernels_are_launched_by_submit_alone():
    found = {path.name: list(launches(ast.parse(path.read_text(encoding="utf-8")))) for path in KERNELS.glob("*.py")}
    assert len(found.pop("launch.py")) == 1
    assert not {name: lines for name, lines in found.items() if lines}
    kernels = [path.name for path in KERNELS.glob("*.py") if "def launch" in path.read_text(encoding="utf-8")]
    assert {"arm.py", "arm_fields.py", "heun.py", "keyed.py", "norm_mish.py", "accumulate_moments.py"} == set(kernels)
    assert all("submit(" in (KERNELS / name).read_text(encoding="utf-8") for name in kernels)


def test_the_device_of_the_tensors_is_the_current_one_while_a_kernel_starts(monkeypatch):
    pytest.importorskip("triton")
    from ttcfast.kernels.launch import submit

    events = []

    class Device:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            events.append(f"enter {self.device}")

        def __exit__(self, *_):
            events.append(f"leave {self.device}")

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: events.append((grid, arguments, options))

    monkeypatch.setattr(torch.cuda, "device", Device)
    submit(Kernel(), 7, torch.device("cuda:1"), "x", 2, BLOCK=8)
    assert events == ["enter cuda:1", ((7,), ("x", 2), {"BLOCK": 8, "enable_fp_fusion": False}), "leave cuda:1"]
    events.clear()
    submit(Kernel(), 7, torch.device("cpu"), "x")
    assert events == [((7,), ("x",), {"enable_fp_fusion": False})]
