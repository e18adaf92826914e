"""PRMScorer: what it opens and refuses, its options, its direction, its place in a controller and beside ARM."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.rewards.prm.test_model import NORMALIZER, SeedPRM, networks, pairs, trained_looking
from tests.surrogates import drop_surrogate
from ttcfast import ARMScorer, PRMScorer, StateSpec, TTCConfig, TTCGreedy
from ttcfast.rewards.common import ScoreContext, ScorerList
from ttcfast.rewards.prm.model import PRM
from ttcfast.runtime.errors import CheckpointError
from ttcfast.spec import ARMWeights

CONTEXT = ScoreContext(0, torch.arange(2))


def test_it_opens_folders_the_sketchs_state_dicts_and_models(tmp_path):
    state, candidates = pairs()
    network = networks()[0]
    network.save_pretrained(tmp_path / "prm")
    expected = network.score_group(state, candidates)
    assert torch.equal(PRMScorer(tmp_path / "prm", 8).score(state, candidates), expected)
    assert torch.equal(PRMScorer(network)(state, candidates), expected)
    seed = SeedPRM(8, 6, 2)
    torch.save(seed.state_dict(), tmp_path / "prm.pt")
    scores = PRMScorer(tmp_path / "prm.pt", in_ch=8).score(state[0].expand_as(candidates[0]), candidates[0])
    torch.testing.assert_close(scores, seed(state[0].expand_as(candidates[0]), candidates[0]), rtol=1e-5, atol=1e-6)


def test_another_in_ch_is_one_clear_error(tmp_path):
    networks()[0].save_pretrained(tmp_path / "prm")
    with pytest.raises(CheckpointError, match=r"in_ch is 10 and the reward model .*prm has in_ch 8"):
        PRMScorer(tmp_path / "prm", 10)
    with pytest.raises(CheckpointError, match="spec has 5 channels"):
        PRMScorer(tmp_path / "prm", spec=StateSpec.euler3d())
    with pytest.raises(ValueError, match="in_ch 8, so it takes states"):
        PRMScorer(tmp_path / "prm").score(torch.rand(5, 8, 8), torch.rand(2, 5, 8, 8))
    with pytest.raises(ValueError, match="prm_ckpt is a Linear"):
        PRMScorer(nn.Linear(1, 1))


@pytest.mark.parametrize("chunk", [1, 2, 5])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_chunks_and_channels_last_score_alike(kind, chunk):
    state, candidates = pairs(n=3, b=4)
    expected = networks()[kind].score_group(state, candidates)
    for channels_last in (False, True):
        scores = PRMScorer(networks()[kind], chunk=chunk, channels_last=channels_last).score(state, candidates)
        torch.testing.assert_close(scores, expected, rtol=2e-5, atol=1e-6)


def test_bfloat16_keeps_a_float32_head():
    state, candidates = pairs()
    for network in networks():
        network.requires_grad_(False)
        exact, cheap = PRMScorer(network).score(state, candidates), PRMScorer(network, dtype=torch.bfloat16).score(state, candidates)
        assert cheap.dtype == torch.float32
        assert not torch.equal(cheap, exact)
        torch.testing.assert_close(cheap, exact, rtol=0.1, atol=0.1 * float(exact.abs().max()))
        assert not torch.equal(cheap, cheap.bfloat16().float())


def test_what_is_not_finite_scores_minus_infinity():
    state, candidates = pairs()
    candidates[0, 1, 2, 3, 3], candidates[1, 0, 0, 0, 0] = torch.nan, torch.inf
    for network in networks():
        scores = PRMScorer(network).score(state, candidates)
        assert (scores == -torch.inf).nonzero().tolist() == [[0, 1], [1, 0]]
        assert scores.isfinite().sum() == 4


def test_the_dense_direction_is_the_predicted_error_in_physical_units():
    network = networks()[1]
    state, candidates = pairs()
    moves = PRMScorer(network, chunk=2).ascent(state, candidates, CONTEXT)
    field = network.error_group(state, candidates) * NORMALIZER.delta_std.reshape(4, 1, 1)
    torch.testing.assert_close(moves, field, rtol=1e-4, atol=1e-6)


def test_the_scalar_direction_raises_the_score_by_the_margin():
    network = networks()[0].double()
    state, candidates = (x.double() for x in pairs())
    network.info = {"margin": 0.3}
    with torch.no_grad():  # as a controller calls it
        moves = PRMScorer(network).ascent(state, candidates, CONTEXT)
    short = 1e-5
    gain = network.score_group(state, candidates + short * moves) - network.score_group(state, candidates)
    torch.testing.assert_close(gain / short, torch.full_like(gain, 0.3), rtol=1e-3, atol=1e-6)
    assert all(p.grad is None for p in network.parameters())


def test_collapsed_scores_fall_back_to_the_deterministic_step_and_are_counted():
    state, _ = pairs()
    surrogate = drop_surrogate()
    dead = networks()[0]
    nn.init.zeros_(dead.head[-1].weight)
    result = TTCGreedy(surrogate, PRMScorer(dead), TTCConfig(branching_factor=4)).rollout(state, 3, return_info=True)
    assert result.collapsed.all() and result.chosen.eq(0).all()
    assert torch.equal(result.trajectory[:, 1], surrogate.deterministic(state))
    alive = TTCGreedy(surrogate, PRMScorer(networks()[0]), TTCConfig(branching_factor=4)).rollout(state, 3, return_info=True)
    assert not alive.collapsed.any() and alive.chosen.ne(0).any()


def test_prm_and_arm_together_by_their_standings_in_the_group():
    state, candidates = pairs(n=2, b=5)
    prm = PRMScorer(trained_looking(PRM(8, 6, 2, normalizer=NORMALIZER)))
    arm = ARMScorer(ARMWeights(), 1.0, momentum="components", scale="relative")
    both = ScorerList({"prm": prm, "arm": arm}, {"prm": 1.0, "arm": 0.5}, zscore=True)
    candidates[0, 2, 0, 0, 0] = torch.nan
    scores, parts = both.score(state, candidates), both.breakdown(state, candidates)
    assert (scores == -torch.inf).nonzero().tolist() == [[0, 2]]

    def standing(values):
        return (values - values.mean()) / values.std(correction=0)

    for problem in range(2):
        ok = scores[problem].isfinite()
        expected = standing(parts["prm"][problem, ok]) + 0.5 * standing(parts["arm"][problem, ok])
        torch.testing.assert_close(scores[problem, ok], expected, rtol=1e-4, atol=1e-5)
