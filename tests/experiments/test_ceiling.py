"""The ceiling of a source: what the oracle gains among its candidates, checked where the best candidate is known."""

from __future__ import annotations

import csv

import pytest

from tests.surrogates import euler_state, shift_surrogate, shifted
from ttcfast.evaluation.evaluate import Problems
from ttcfast.experiments import ceiling as module
from ttcfast.experiments.ceiling import CeilingConfig, ceiling
from ttcfast.runtime.errors import ArgumentError

SOURCES = {"noisy": {"dropout": False, "input_eps": 0.02}, "faint": {"dropout": False, "input_eps": 0.001}}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A model that moves states by one cell, and a truth that does so with noise: only noisy candidates come nearer."""
    fm = shift_surrogate()
    truth = shifted(euler_state(3), 4)
    truth[:, 1:] = truth[:, 1:] + 0.02 * euler_state(12, seed=5).reshape(3, 4, 4, 8, 8)
    monkeypatch.setattr(module, "open_surrogate", lambda *_, **__: fm)
    monkeypatch.setattr(module, "read_problems", lambda _, __, steps, **___: (Problems(truth, fm.spec, steps, shown=()), None))
    monkeypatch.setattr(type(fm), "parameters", lambda self: iter([truth]))
    return CeilingConfig("x", ("x",), SOURCES, factors=(2, 8), states=(0, 2), steps=2, out=str(tmp_path))


def test_more_candidates_never_make_a_single_step_worse(config, tmp_path):
    rows = {(r.source, r.branching_factor, r.projected): r for r in ceiling(config)}
    assert len(rows) == 2 * 2 * 2
    for source in SOURCES:
        for projected in (False, True):
            few, many = rows[source, 2, projected], rows[source, 8, projected]
            assert many.one_step <= few.one_step <= few.deterministic_one_step == many.deterministic_one_step
            assert many.improved >= few.improved
        assert rows[source, 2, False].deterministic_one_step == 1
        assert rows[source, 8, True].deterministic_one_step == pytest.approx(1), "a shift keeps every total"
    assert rows["faint", 8, False].one_step < 1 and rows["faint", 8, False].rollout < 1 == rows["faint", 8, False].deterministic_rollout
    assert rows["noisy", 8, False].one_step != rows["faint", 8, False].one_step
    with open(tmp_path / "ceiling.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 8


def test_wrong_input(config, tmp_path):
    with pytest.raises(ArgumentError, match=r"states are \[4\] and steps 0; the data have 4 steps"):
        ceiling(CeilingConfig("x", ("x",), SOURCES, states=(4,), out=str(tmp_path)))
    with pytest.raises(ArgumentError, match=r"sources.a: stochastic has unknown keys \['drop'\]"):
        ceiling(CeilingConfig("x", ("x",), {"a": {"drop": 1}}, out=str(tmp_path)))
    with pytest.raises(ValueError, match="factors is 1; it must be at least 2"):
        CeilingConfig("x", ("x",), SOURCES, factors=(1,))
