"""Top-k of FlashInfer is a peer where the package is there, is asked for our ties, and is left out where it is not."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from bench import bench_topk
from bench.bench_topk import Problem


@pytest.fixture
def installed(monkeypatch):
    """FlashInfer's interface on the CPU: what it is asked for is kept, and without ``sorted`` the result has no order."""
    calls = []

    def top_k(scores, k, sorted=False, deterministic=False, tie_break=0):
        calls.append((sorted, deterministic, tie_break, os.environ.get("FLASHINFER_TOPK_ALGO")))
        found = scores.sort(dim=1, descending=True, stable=True)
        values, indices = found.values[:, :k], found.indices[:, :k]
        return (values, indices) if sorted else (values.flip(1), indices.flip(1))

    monkeypatch.setattr(bench_topk, "flashinfer", lambda: SimpleNamespace(top_k=top_k))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    return calls


def test_absent_packages_leave_no_peer(monkeypatch):
    monkeypatch.setattr(bench_topk, "flashinfer", lambda: None)
    assert not [name for name in Problem(1, 10, 2, "random", "cuda").peers(tiny=True) if "FlashInfer" in name]


def test_both_of_its_ways_do_the_work_that_the_gate_asks_for(installed, monkeypatch):
    monkeypatch.delenv("FLASHINFER_TOPK_ALGO", raising=False)
    problem = Problem(3, 200, 20, "tied", "cpu")
    peers = {"FlashInfer": bench_topk.by_flashinfer, "FlashInfer, CUB": bench_topk.by_flashinfer_cub}
    problem.check(peers)
    assert installed == [(True, True, 1, None), (False, False, 1, "cub")]
    assert "FLASHINFER_TOPK_ALGO" not in os.environ
    with pytest.raises(AssertionError, match="unsorted: "):
        problem.check({"unsorted": lambda p: tuple(x.flip(1) for x in peers["FlashInfer"](p))})


def test_cub_has_rows_of_a_limited_length(installed):
    for n, there in ((2**21, True), (2**21 + 1, False)):
        assert ("FlashInfer, CUB" in Problem(1, n, 2, "random", "cuda").peers(tiny=True)) == there
