"""How an implementation is chosen, and what is said when none can be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from ttcfast.ops import BackendError, arm, registry
from ttcfast.ops.registry import Backend, choose, yes
from ttcfast.spec import StateSpec

ROOT = __file__.rsplit("/tests/", 1)[0]


def backends(**reasons: str | None) -> list[Backend]:
    """Backends by name, in order, each with the reason for which it does not support the arguments."""
    return [Backend(name, yes, lambda *_, reason=reason: reason, lambda: None) for name, reason in reasons.items()]


@pytest.fixture(autouse=True)
def no_binding(monkeypatch):
    monkeypatch.delenv("TTCFAST_BACKEND", raising=False)


def test_auto_takes_the_first_that_supports_the_arguments():
    assert choose("op", backends(cpu="too large", triton=None, reference=None), "auto").name == "triton"


def test_asked_for_by_name_runs_or_raises_with_its_reason():
    found = backends(cpu="too large", reference=None)
    assert choose("op", found, "reference").name == "reference"
    with pytest.raises(BackendError, match=r"^op: backend 'cpu' cannot run: too large$"):
        choose("op", found, "cpu")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(BackendError, match="op has no backend 'cdua'; it has cpu, reference and 'auto'"):
        choose("op", backends(cpu=None, reference=None), "cdua")


def test_no_backend_at_all_gives_every_reason():
    with pytest.raises(BackendError, match="cpu: a; triton: b"):
        choose("op", backends(cpu="a", triton="b"), "auto")


def test_unavailable_is_told_before_unsupported():
    absent = Backend("cpu", lambda: "not built", lambda: pytest.fail("asked an absent backend"), lambda: None)
    with pytest.raises(BackendError, match="not built"):
        choose("op", [absent], "cpu")


@pytest.mark.parametrize(
    ("variable", "chosen"),
    [
        ("", "cpu"),
        ("reference", "reference"),
        ("cuda", "cpu"),  # an operation without that backend is left on auto
        ("op:triton", "triton"),
        ("other:triton", "cpu"),
        ("reference,op:triton", "triton"),
        ("op:triton,reference", "triton"),
        (" op:triton , other:cpu", "triton"),
        ("reference,op:auto", "cpu"),
    ],
)
def test_environment_binds_operations(monkeypatch, variable, chosen):
    monkeypatch.setenv("TTCFAST_BACKEND", variable)
    assert choose("op", backends(cpu=None, triton=None, reference=None), "auto").name == chosen


def test_argument_wins_over_environment(monkeypatch):
    monkeypatch.setenv("TTCFAST_BACKEND", "reference")
    assert choose("op", backends(cpu=None, reference=None), "cpu").name == "cpu"


def test_environment_that_cannot_be_obeyed_raises_and_names_itself(monkeypatch):
    found = backends(cpu=None, triton="no GPU")
    monkeypatch.setenv("TTCFAST_BACKEND", "triton")
    with pytest.raises(BackendError, match=r"'triton' \(asked for by TTCFAST_BACKEND\) cannot run: no GPU"):
        choose("op", found, "auto")
    monkeypatch.setenv("TTCFAST_BACKEND", "op:cuda")
    with pytest.raises(BackendError, match=r"no backend 'cuda' \(asked for by TTCFAST_BACKEND\)"):
        choose("op", found, "auto")
    monkeypatch.setenv("TTCFAST_BACKEND", "tritn")
    with pytest.raises(BackendError, match="TTCFAST_BACKEND names the backend 'tritn'; known: auto, reference"):
        choose("op", found, "auto")


@pytest.mark.skipif(torch.cuda.is_available() or registry.interpreting(), reason="Triton can run here")
def test_triton_without_gpu_and_interpreter_is_one_clear_line():
    with pytest.raises(BackendError, match=r"arm: backend 'triton' cannot run: .*(no CUDA GPU|cannot be imported)") as caught:
        arm(torch.ones(1, 4, 2, 2), torch.ones(1, 1, 4, 2, 2), StateSpec.euler2d(), backend="triton")
    assert "\n" not in str(caught.value)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_environment_reaches_the_operation(monkeypatch):
    state = torch.ones(1, 4, 2, 2)
    monkeypatch.setenv("TTCFAST_BACKEND", "reference")
    assert arm(state, state[:, None], StateSpec.euler2d()).score.item() == 0
    monkeypatch.setenv("TTCFAST_BACKEND", "arm:cuda")
    with pytest.raises(BackendError, match=r"arm has no backend 'cuda' \(asked for by TTCFAST_BACKEND\)"):
        arm(state, state[:, None], StateSpec.euler2d())


def test_works_without_extension_and_triton():
    code = """
import sys
sys.modules["ttcfast._C"] = sys.modules["triton"] = None
import torch, ttcfast.ops as ops
from ttcfast.spec import StateSpec
x = torch.ones(1, 4, 2, 2)
assert ops.arm(x, x[:, None], StateSpec()).score.item() == 0
for name in ("cpu", "triton"):
    try:
        ops.arm(x, x[:, None], StateSpec(), backend=name)
    except ops.BackendError as error:
        print(error)
print(ops.info())
"""
    done = run(code, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert "the compiled extension ttcfast._C cannot be imported" in done.stdout and "triton cannot be imported" in done.stdout


def test_importing_ops_imports_neither_triton_nor_the_extension():
    # torch itself may import triton; what counts is that we add nothing to it.
    code = """
import sys, torch
before = set(sys.modules)
import ttcfast.ops
print([m for m in set(sys.modules) - before if m.split(".")[0] == "triton" or m == "ttcfast._C"])
"""
    assert run(code).stdout == "[]\n"
