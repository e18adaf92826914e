"""A greedy step recorded as a CUDA graph: on the fake device, which raises at any wait within a record and replays it on its memory."""

from __future__ import annotations

import pytest
import torch

from tests.fake.cases import CASES, GREEDY, Case
from tests.fake.test_searches import require_equal
from tests.fake_cuda import FakeCuda, Graph, on_host
from tests.surrogates import brittle, drop_surrogate, shift_surrogate
from ttcfast.core import onednn
from ttcfast.core.base_fm import Surrogate
from ttcfast.rewards.common import ARMScorer, Scorer
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.search import Search

T, WARM = 6, 3  # the first step, and two more to warm up
RECORDED = {
    *("dropout", "whole problems in chunks", "chunks", "memory budget", "latent and input noise, antithetic", "bfloat16"),
    *(
        "vision transformer",
        "normalised",
        "two frames",
        "directions",
        "directions on a grid, and dropout",
        "reward model",
        "dense reward model",
        "sum of rewards",
    ),
    *("reward model with a residual", "residual of the equations", "residual by finite volumes", "residual of vorticity", "fields"),
    *("mask, volumes, gamma, budgets", "mean", "softmax", "refined", "refined by a reward model", "projected"),
    "without the deterministic step",
}


class Last(Scorer):
    """The last cell's density, at any step the same."""

    timeless = property(lambda self: True)

    def score_group(self, state, candidates, context):
        return candidates[:, :, 0, -1, -1]


@pytest.fixture(autouse=True)
def products_of_torch(monkeypatch):
    """The fake device multiplies as torch does on a CPU, where a surrogate takes oneDNN."""
    monkeypatch.setattr(onednn, "_product", None)


@pytest.fixture
def replays(monkeypatch) -> list[int]:
    """One entry for every replay of a graph."""
    found, replay = [], Graph.replay
    monkeypatch.setattr(Graph, "replay", lambda graph: found.append(1) or replay(graph))
    return found


def searching(case: Case, device: str) -> Search:
    """The case's search, whose surrogate is to record its steps."""
    plain = case.search(device)
    if not isinstance(plain.fm, Surrogate):
        return plain
    kind = TTCGreedy if isinstance(plain, TTCGreedy) else TTCBeam
    scorer = getattr(plain.scorer, "scorer", plain.scorer) if case.options.get("project") else plain.scorer
    return kind(plain.fm.variant(graph=True), scorer, plain.cfg, **case.controller)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*GREEDY, *("beams", "particles")])
def test_a_recorded_step_is_the_step_and_what_cannot_be_recorded_is_made_without(name, replays):
    case = CASES[name]
    torch.manual_seed(0)
    expected = case.search("cpu").rollout(case.start(), T, return_info=True, **case.rollout)
    with FakeCuda():
        search, x0 = searching(case, "cuda"), case.start().cuda()
        torch.manual_seed(0)
        found = on_host(search.rollout(x0, T, return_info=True, **case.rollout))
    require_equal(found, expected)
    assert len(replays) == (T - WARM if name in RECORDED else 0)


def test_a_recorded_step_waits_once_and_launches_nothing_but_its_graph(replays):
    case = CASES["dropout"]
    with FakeCuda() as gpu:
        search, x0 = searching(case, "cuda"), case.start().cuda()
        steps = search.rollout_iter(x0, 8)
        for _ in range(WARM + 1):
            next(steps)
        launched = gpu.launches.copy()
        with gpu.counting() as waits:
            for _ in range(3):
                next(steps)
    assert sum(waits.values()) == 3 and {place.split(":")[0] for place, _ in waits} == {"ttcfast/ttc/select/keep.py"}
    assert gpu.launches == launched and len(replays) == 4


@pytest.mark.filterwarnings("ignore")
def test_steps_without_a_candidate_are_made_again_without_the_record(replays):
    """The last cell, the score, is another one of the start at every step, here and there below the floor."""
    case = Case(shift_surrogate, Last, {"score_floor": 1.03, "max_resample": 1})
    expected = case.search("cpu").rollout(case.start(), 16, return_info=True)
    with FakeCuda():
        found = searching(case, "cuda").rollout(case.start().cuda(), 16, return_info=True)
    require_equal(on_host(found), expected)
    missed = expected.fallbacks[:, WARM:].any(0)
    assert len(replays) == 16 - WARM and 0 < int(missed.sum()) < 16 - WARM


@pytest.mark.filterwarnings("ignore")
def test_other_numbers_of_problems_have_records_of_their_own(replays):
    case = Case(lambda: brittle(1.19, 0.01), Last, {"branching_factor": 3, "max_resample": 0})
    expected = case.search("cpu").rollout(case.start(), 24, return_info=True)
    with FakeCuda():
        found = searching(case, "cuda").rollout(case.start().cuda(), 24, return_info=True)
    require_equal(on_host(found), expected)
    alive = (~expected.frozen).sum(0).tolist()
    assert len(set(alive)) > 1 and len(replays) > WARM, alive


def test_a_step_that_cannot_be_recorded_is_told_once_and_made_as_ever(replays):
    class Asking(Last):
        def score_group(self, state, candidates, context):
            return super().score_group(state, candidates, context) + float(candidates.amax()) * 0

    case = Case(scorer=Asking)
    expected = case.search("cpu").rollout(case.start(), T)
    with FakeCuda(), pytest.warns(RuntimeWarning, match=r"not recorded as a CUDA graph \(operation not permitted") as told:
        found = searching(case, "cuda").rollout(case.start().cuda(), T)
    assert torch.equal(on_host(found), expected) and not replays and len(told) == 1


def test_new_weights_are_seen_by_the_next_replay_and_the_next_rollout_records_anew(replays):
    case = CASES["dropout"]

    def rolled(device: str) -> torch.Tensor:
        search, x0, states = searching(case, device), case.start().to(device), []
        for rollout in range(2):
            for i, out in enumerate(search.rollout_iter(x0, T)):
                states.append(out.state)
                if i == WARM:
                    with torch.no_grad():
                        search.fm.model.head.weight.mul_(1.5)
            search.scorer.weights = {"mass": 1.0 + rollout, "energy": 0.5}
        return torch.stack(states)

    expected = rolled("cpu")
    with FakeCuda():
        found = rolled("cuda")
    assert torch.equal(on_host(found), expected) and len(replays) == 2 * (T - WARM)


def test_on_the_host_nothing_is_recorded():
    plain, recording = (TTCGreedy(drop_surrogate().variant(graph=graph), ARMScorer()) for graph in (False, True))
    x0 = CASES["dropout"].start()
    assert recording.fm.graph and torch.equal(plain.rollout(x0, T), recording.rollout(x0, T))
