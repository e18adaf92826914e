"""Every group's cases at sizes of a few cells: the gates pass, and what the targets name exists."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch

from bench import groups
from bench.bench_arm import Problem
from bench.rows import COLUMNS

GROUPS = groups.names()


@pytest.mark.parametrize("group", GROUPS)
def test_gates_pass_at_tiny_sizes(group):
    if group == "triplets":
        pytest.importorskip("h5py")
    cases = list(groups.cases(group, "cpu", tiny=True))
    assert cases
    for case in cases:
        case.check()
        for run in case.peers.values():
            run()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("group", GROUPS)
def test_names_are_unique_and_targets_name_what_is_there(group, device):
    cases = list(groups.cases(group, device))
    assert len({case.name for case in cases}) == len(cases)
    assert {(case.group, case.device) for case in cases} <= {(group, device)}
    for target in groups.targets(group):
        assert target.column in COLUMNS
        if target.device == device:
            named = [case for case in cases if fnmatchcase(case.name, target.case)]
            assert named, target
            assert all(not target.peer or any(fnmatchcase(p, target.peer) for p in c.peers if p != c.ours) for c in named), target


def test_backends_are_those_that_can_run_on_the_device():
    assert groups.backend_of("arm", "cpu") in ("cpu", "reference")
    assert groups.backend_of("arm", "cuda") in ("triton", "cuda", "reference")


def test_the_gate_of_arm_sees_a_wrong_peer():
    problem = Problem(2, 5, 6, False, "cpu")
    right = problem.peers(tiny=True)["sliced, torch.compile"]
    problem.check({"right": right})
    with pytest.raises(AssertionError, match=r"off: .*not close"):
        problem.check({"off": lambda p: right(p) + 1e-3})
    with pytest.raises(AssertionError, match="blind: "):
        problem.check({"blind": lambda p: right(p).nan_to_num(neginf=0.0)})
    with pytest.raises(AssertionError, match="careless: "):
        problem.check({"careless": lambda p: right(replace_density(p))})
    assert bool(problem.cand.isfinite().all())  # what the gate poisoned is undone, also after it said no


def replace_density(problem: Problem) -> Problem:
    """The same problem, its negative densities forgiven."""
    other = Problem(*problem.sizes, problem.violating, problem.device)
    other.cand = torch.where(problem.cand < -50, 1.0, problem.cand)
    return other
