import pytest
import torch

from tests.surrogates import Foreign, drop_surrogate, euler_state, shift_surrogate
from ttcfast.evaluation.baselines import baseline_rollout
from ttcfast.metrics import conservation_drift
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.stochastic_sampling import DeterministicModelError

CFG = TTCConfig(branching_factor=5)


def test_deterministic_is_the_model_with_every_noise_off():
    fm, x0 = drop_surrogate(), euler_state()
    r = baseline_rollout("deterministic", fm, x0, 3, CFG)
    x = x0
    for t in range(3):
        x = fm.deterministic(x)
        assert torch.equal(r.trajectory[:, t + 1], x)
    assert r.nfe == 9 and bool((r.chosen == 0).all())


def test_random_is_one_stochastic_candidate_per_step():
    fm, x0 = drop_surrogate(), euler_state()
    r = baseline_rollout("random", fm, x0, 3, CFG)
    assert r.nfe == 9 and r.scores.shape == (3, 3, 1)
    assert torch.equal(r.trajectory[:, 1], fm.candidates(x0, torch.arange(1), seed=0, step=0)[:, 0])
    assert not torch.equal(r.trajectory[:, 1], fm.deterministic(x0))


def test_random_takes_any_of_the_symmetries():
    fm, x0 = drop_surrogate(), euler_state()
    noise = {"dropout": False, "symmetry": True}
    r = baseline_rollout("random", fm, x0, 6, TTCConfig(branching_factor=8, stochastic=noise))
    assert len(set(r.chosen.flatten().tolist())) > 4 and r.nfe == 3 * 6 * 8
    again = baseline_rollout("random", fm, x0[1:], 6, TTCConfig(branching_factor=8, stochastic=noise), problem_ids=torch.tensor([1, 2]))
    assert torch.equal(again.chosen, r.chosen[1:])


@pytest.mark.parametrize("chunk", [None, 1, 4])
def test_mean_is_that_of_the_candidates_with_the_deterministic_one(chunk):
    fm, x0 = drop_surrogate(), euler_state()
    r = baseline_rollout("mean", fm, x0, 2, TTCConfig(branching_factor=5, chunk_size=chunk, score_floor=1.0))
    assert r.nfe == 30 and bool((r.chosen == -1).all()) and set(r.interventions().values()) == {0}
    drawn = fm.candidates(x0, torch.arange(1, 5), seed=0, step=0)
    expected = (fm.deterministic(x0) + drawn.sum(1)) / 5
    torch.testing.assert_close(r.trajectory[:, 1], expected)


def test_the_mean_of_noise_around_the_truth_beats_one_sample():
    x0 = euler_state()
    error = {
        kind: (baseline_rollout(kind, shift_surrogate(0.1), x0, 3, TTCConfig(branching_factor=16)).trajectory[:, -1] - x0.roll(3, -1))
        .square()
        .mean()
        for kind in ("deterministic", "random", "mean")
    }
    assert error["deterministic"] == 0 and error["mean"] < 0.2 * error["random"]


def test_the_mean_leaves_out_what_is_not_finite():
    fm = Foreign(spoil=lambda out, call: torch.where(torch.arange(len(out)).reshape(-1, 1, 1, 1) % 5 == 2, torch.nan, out))
    r = baseline_rollout("mean", fm, euler_state(), 2, CFG)
    assert r.trajectory.isfinite().all() and bool((r.nonfinite == 1).all())


@pytest.mark.parametrize("kind", ["deterministic", "random", "mean"])
def test_each_has_a_projected_form(kind):
    cfg = TTCConfig(branching_factor=3, project="conservation")
    r = baseline_rollout(kind, drop_surrogate(scale=0.1), euler_state(), 5, cfg)
    assert max(float(d.max()) for d in conservation_drift(r.trajectory, StateSpec.euler2d()).values()) < 1e-6


def test_foreign_models_have_the_baselines_they_can():
    x0 = euler_state()
    assert baseline_rollout("random", Foreign(), x0[0], 2).trajectory.shape == (4, 3, 8, 8)
    assert baseline_rollout("mean", Foreign(), x0, 2).nfe == 30
    with pytest.raises(ValueError, match=r"include_deterministic is True but Foreign has only sample_next"):
        baseline_rollout("deterministic", Foreign(), x0, 2)


def test_wrong_kinds():
    with pytest.raises(ValueError, match="kind is 'median'; it must be one of 'deterministic', 'random', 'mean'"):
        baseline_rollout("median", Foreign(), euler_state(), 2)
    with pytest.raises(DeterministicModelError):
        baseline_rollout("mean", shift_surrogate(0.0), euler_state(), 2)
