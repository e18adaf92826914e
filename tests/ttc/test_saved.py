"""A rollout that is killed goes on from its last step; what its chunks take is measured."""

import pytest
import torch

from tests.surrogates import Brittle, drop_surrogate, euler_state
from ttcfast.core.base_fm import Surrogate
from ttcfast.runtime.errors import CheckpointError
from ttcfast.spec import StateSpec, StochasticConfig, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.budget import Budget
from ttcfast.ttc.memory import bytes_per_candidate
from ttcfast.ttc.sources import as_source


def last_cell(x_t, cand_tp1):
    return cand_tp1[:, 0, -1, -1]


class Killed(Exception):
    pass


class Dies:
    """A score that ends the process, so to speak, at its n-th call."""

    def __init__(self, calls):
        self.left = calls

    def __call__(self, x_t, cand_tp1, *, context):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return cand_tp1[:, :, 0, -1, -1]


@pytest.mark.filterwarnings("ignore:step")
@pytest.mark.parametrize("case", ["beam", "particle", "budget", "deaths"])
def test_a_killed_rollout_goes_on_to_the_same_trajectory(case, tmp_path):
    brittle = Surrogate(Brittle(1.15), StateSpec.euler2d(), stochastic=StochasticConfig(dropout=False, input_eps=0.015))
    fm, x0 = brittle if case == "deaths" else drop_surrogate(history=2), euler_state(6)
    x0 = x0 if case == "deaths" else x0.view(3, 2, 4, 8, 8)
    budget = Budget(70) if case == "budget" else None
    cfg = TTCConfig(branching_factor=4, beam_width=2, approach="particle" if case == "particle" else "beam", max_resample=0)

    def roll(calls, folder, steps=6):
        return TTCBeam(fm, Dies(calls), cfg).rollout(x0, steps, return_info=True, budget=budget, resume=folder)

    whole = roll(10**6, None)
    if case == "deaths":
        assert whole.frozen.any() and not whole.frozen.all()
    for calls in (2, 1, 1):  # killed in step 1, then a step later, and again
        with pytest.raises(Killed):
            roll(calls, tmp_path)
    resumed = roll(10**6, tmp_path)
    for name in ("trajectory", "scores", "chosen", "fallbacks", "frozen", "nonfinite"):
        torch.testing.assert_close(getattr(resumed, name), getattr(whole, name), rtol=0, atol=0, equal_nan=True)
    assert (resumed.nfe, resumed.copies, resumed.searched) == (whole.nfe, whole.copies, whole.searched)
    finished = roll(0, tmp_path)  # nothing is left to do
    torch.testing.assert_close(finished.trajectory, whole.trajectory, rtol=0, atol=0, equal_nan=True)
    assert [p.name for p in tmp_path.iterdir()] == ["rollout.safetensors"]


def test_a_folder_of_another_rollout_is_refused_with_the_keys_that_differ(tmp_path):
    x0, cfg = euler_state(1), {"branching_factor": 3, "beam_width": 2, "approach": "beam"}
    TTCBeam(drop_surrogate(), last_cell, TTCConfig(**cfg)).rollout(x0, 2, resume=tmp_path)
    changed = TTCBeam(drop_surrogate(), last_cell, TTCConfig(**{**cfg, "seed": 3, "lookahead": 1}))
    with pytest.raises(CheckpointError, match=r"another configuration: lookahead is 1, there 0; seed is 3, there 0; give another folder"):
        changed.rollout(x0, 2, resume=tmp_path)
    other = drop_surrogate()
    other.model.head.bias.data += 1
    with pytest.raises(CheckpointError, match=r": T is 3, there 2; x0 is .*; model is 'Surrogate"):
        TTCBeam(other, last_cell, TTCConfig(**cfg)).rollout(x0 + 1, 3, resume=tmp_path)
    (tmp_path / "rollout.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="is damaged"):
        TTCBeam(drop_surrogate(), last_cell, TTCConfig(**cfg)).rollout(x0, 2, resume=tmp_path)


class Hungry:
    """A score that takes so many bytes for each candidate while it works."""

    def __init__(self, each):
        self.each = each

    def __call__(self, x_t, cand_tp1, *, context):
        waste = torch.ones(cand_tp1.shape[1], self.each // 4)
        return cand_tp1[:, :, 0, 0, 0] + waste.sum() * 0


@pytest.mark.parametrize("each", [200_000, 2_000_000])
def test_a_memory_budget_decides_by_what_is_measured(each):
    controller = TTCBeam(drop_surrogate(), Hungry(each), TTCConfig(branching_factor=300, memory_budget=16 * each, approach="beam"))
    x0, ids = euler_state(1), torch.tensor([0])
    measured = bytes_per_candidate(as_source(controller.fm, controller.cfg), controller.scorer, controller.cfg, x0, ids, first_id=1000)
    assert 0.95 * each < measured < 1.2 * each + 50_000
    size = controller._chunks(x0, ids).size
    assert size in (8, 16)
    with pytest.raises(
        ValueError, match=r"memory_budget is 65536 bytes and generating and scoring one candidate takes \d{6,7}; give at least"
    ):
        TTCBeam(drop_surrogate(), Hungry(each), TTCConfig(memory_budget=65536)).rollout(x0, 1)
