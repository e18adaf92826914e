"""Every Triton kernel is launched on the device of its tensors, whatever the current one is, and at little cost to the host."""

from __future__ import annotations

import ast
import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ttcfast.ops import registry
from ttcfast.spec import ARMWeights, StateSpec

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
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    submit(Kernel(), 7, torch.device("cuda:1"), "x", 2, BLOCK=8)
    assert events == ["enter cuda:1", ((7,), ("x", 2), {"BLOCK": 8, "enable_fp_fusion": False}), "leave cuda:1"]
    for device in ("cuda:0", "cpu"):
        events.clear()
        submit(Kernel(), 7, torch.device(device), "x")
        assert events == [((7,), ("x",), {"enable_fp_fusion": False})]


class Driver:
    """Triton's driver without a GPU: kernels are compiled for sm_90, and what their launchers are given is kept."""

    def __init__(self):
        self.launches: list[Any] = []
        self.loaded = 0
        self.utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": 232448}, load_binary=self.load)

    def load(self, *_):
        self.loaded += 1
        return object(), f"kernel {self.loaded}", 32, 0, 1024  # module, function, registers, spills, threads

    def launcher_cls(self, *_):
        return lambda x, y, z, stream, function, packed, metadata, enter, leave, *given: self.launches.append(((x, y, z), function, given))

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 99  # a number of its own, by which Triton keeps what it compiled

    def get_current_stream(self, _):
        return 0


@pytest.fixture
def driver(monkeypatch):
    runtime = pytest.importorskip("triton.runtime")
    if registry.interpreting():
        pytest.skip("Triton interprets: nothing is compiled, and no launch remembered")
    found = Driver()
    monkeypatch.setattr(runtime.driver, "_active", found)
    monkeypatch.setattr(import_module("ttcfast.kernels.launch"), "_known", {})
    return found


def arm_launches(shape=(1, 6, 4, 16, 16), dtype=torch.float32, offset=0, gamma=1.4, **options):
    """Launch what ``arm`` does for candidates of a shape, ``offset`` elements from an aligned address; return their address."""
    module, kernels = import_module("ttcfast.ops.arm"), import_module("ttcfast.kernels.arm")
    candidates = torch.zeros(math.prod(shape) + 16, dtype=dtype)
    candidates = candidates[-candidates.data_ptr() // candidates.element_size() % 16 + offset :][: math.prod(shape)].view(shape)
    spec = StateSpec.euler2d(gamma=gamma)
    call = module.flatten(torch.zeros(shape[:1] + shape[2:], dtype=dtype), candidates, spec, ARMWeights(), "sum", "absolute")
    kernels.launch(call, module._outputs(call), None, None, None, mode=0, relative=False, **options)
    return candidates.data_ptr()


def test_a_launch_that_recurs_starts_what_triton_would_start(driver):
    """Sizes, dtypes, alignment and absent arguments choose what was compiled; addresses and floats are those of each call."""
    launch = import_module("ttcfast.kernels.launch")
    cases = [{}, {"shape": (1, 6, 4, 16, 15)}, {"shape": (1, 1, 4, 16, 16)}, {"dtype": torch.float64}, {"offset": 1}, {"gamma": 1.3}]
    for case in cases:
        arm_launches(**case)
    remembered, compiled = len(launch._known), driver.loaded
    assert remembered == len(cases) - 1  # gamma is a float
    for case in cases:
        driver.launches.clear()
        at = arm_launches(**case)
        again = list(driver.launches)
        assert (len(launch._known), driver.loaded) == (remembered, compiled)
        known = dict(launch._known)
        launch._known.clear()
        driver.launches.clear()
        arm_launches(**case)
        launch._known.update(known)
        for (grid, function, given), (its_grid, its_function, its) in zip(again, driver.launches, strict=True):
            assert (grid, function) == ((*its_grid[:1], 1, 1), its_function)
            assert len(given) == len(its)
            for mine, theirs in zip(given, its):
                assert isinstance(mine, int) if isinstance(theirs, torch.Tensor) else mine == theirs
        assert again[0][2][1] == at and case.get("gamma", 1.4) in again[0][2]


def cost_of(function):
    """Return the instructions of Python and the calls, also of C functions, of ``function``, which has been called before."""
    counts = dict.fromkeys(("opcode", "call", "c_call"), 0)

    def trace(frame, event, _):
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        counts["opcode"] += event == "opcode"
        return trace

    def profile(_, event, __):
        if event in counts:
            counts[event] += 1

    tracing, profiling = sys.gettrace(), sys.getprofile()
    try:
        sys.settrace(trace)
        function()
        sys.settrace(None)
        sys.setprofile(profile)
        function()
    finally:
        sys.setprofile(profiling)
        sys.settrace(tracing)
    return counts["opcode"], counts["call"] + counts["c_call"]


def test_a_launch_that_recurs_costs_few_instructions(driver, monkeypatch):
    """1610 instructions and 159 calls with Python 3.11, for 44 numbers and tensors and 19 options: 10 us on a slow core (budget: 20 us)."""
    launch, kernels = import_module("ttcfast.kernels.launch"), import_module("ttcfast.kernels.arm")
    given = []
    monkeypatch.setattr(kernels, "submit", lambda *arguments, **options: given.append((arguments, options)))
    arm_launches()
    arguments, options = given[0]
    assert len(arguments) + len(options) > 40
    launch.submit(*arguments, **options)
    instructions, calls = cost_of(lambda: launch.submit(*arguments, **options))
    assert instructions < 2000 and calls < 200, (instructions, calls)


def test_what_is_remembered_is_bounded(driver, monkeypatch):
    launch = import_module("ttcfast.kernels.launch")
    monkeypatch.setattr(launch, "MOST_KNOWN", 3)
    for b in range(1, 9):
        arm_launches(shape=(1, b, 4, 16, 16))
        assert 0 < len(launch._known) <= 3
