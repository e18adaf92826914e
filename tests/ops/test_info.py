"""ttcfast.info() says what is there, what is not, and why."""

from __future__ import annotations

import torch

from ttcfast.ops import info, native, registry


def test_every_backend_of_every_operation_has_an_answer():
    found = info()
    assert set(found["ops"]) >= {"arm"}
    for op, backends in found["ops"].items():
        assert list(backends) == [b.name for b in registry.OPS[op]]
        assert backends["reference"] is None
        assert all(reason is None or reason for reason in backends.values())


def test_report_names_each_absence_with_its_reason():
    found = info()
    text = str(found)
    said = {}
    for line in text.splitlines():
        title, _, answer = line.partition(": ")
        what, _, ops = title.partition(" of " if title.startswith("backends") else " for ")
        said |= {(what, op): answer for op in ops.split(", ")}
    for op, backends in found["ops"].items():
        assert said["backends", op] == ", ".join(name for name, reason in backends.items() if reason is None)
        for name, reason in backends.items():
            assert said.get((f"no {name}", op)) == reason
    assert torch.__version__ in text and all(title in text for title in ("extension:", "triton:", "devices:", "environment:"))


def test_environment_is_shown(monkeypatch):
    monkeypatch.setenv("TTCFAST_BACKEND", "arm:reference")
    assert "TTCFAST_BACKEND=arm:reference" in str(info())


def test_extension_says_how_it_was_built():
    if native.available() is not None:
        assert info()["extension"] == native.available()
        return
    built = native.device_info()
    assert built["built_with_cuda"] == ("for CUDA" in info()["extension"])
    assert bool(built["devices"]) != bool(built["reason"])


def test_extension_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(native, "ABI", native.ABI + 1)
    native._load.cache_clear()
    try:
        reason = native.available()
        assert reason is not None and ("another version" in reason or "cannot be imported" in reason)
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
