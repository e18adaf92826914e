"""Updates that the sanity checks skip, what ends a training, and that a resume judges as an unbroken run does."""

from __future__ import annotations

import json
import logging
import random

import pytest
import torch

from tests.pwm.small_models import small
from ttcfast.pwm.algorithms import PWM
from ttcfast.pwm.algorithms.sanity import FEWEST, WINDOW, SanityChecks
from ttcfast.pwm.models import FlowWorldModel, ResidualWorldModel
from ttcfast.runtime.training import TrainingError

OBS, ACT, REW = torch.randn(5, 6, 5), 2 * torch.rand(4, 6, 3) - 1, torch.randn(4, 6, 1)
BAD = torch.full_like(REW, float("nan"))


def judged(checks: SanityChecks, *norms: float) -> list[bool]:
    return [checks.allows(loss=1.0, gradient_norm=norm, latent=1.0) for norm in norms]


def test_a_bad_batch_is_skipped_counted_and_changes_nothing():
    agent = PWM(small(FlowWorldModel), sanity=SanityChecks(patience=3))
    agent.update_wm(OBS, ACT, REW)
    before = [p.detach().clone() for p in agent.model.parameters()]
    moments = [s["exp_avg"].clone() for s in agent.wm_optimizer.state.values()]
    bad = REW.clone()
    bad[1, 2] = float("nan")
    for _ in range(2):
        assert agent.update_wm(OBS, ACT, bad)["updated"] == 0
    assert agent.sanity.counts == {"nan": 2, "gradient": 0, "latent": 0} and not agent.sanity.stopped
    assert all(torch.equal(a, b) for a, b in zip(before, agent.model.parameters()))
    assert all(torch.equal(a, s["exp_avg"]) for a, s in zip(moments, agent.wm_optimizer.state.values()))
    assert agent.update_wm(OBS, ACT, REW)["updated"] == 1  # and the patience begins anew
    for _ in range(3):
        agent.update_wm(OBS, ACT, bad)
    assert agent.sanity.stopped and agent.sanity.skipped == 5


def test_who_goes_on_after_the_stop_is_told():
    agent = PWM(small(FlowWorldModel), sanity=SanityChecks(patience=2))
    for _ in range(2):
        agent.update_wm(OBS, ACT, BAD)
    before = [p.detach().clone() for p in agent.model.parameters()]
    with pytest.raises(TrainingError, match=r"stopped after 2 skipped updates in a row .*'nan': 2.* lower lr or mend the data"):
        agent.update_wm(OBS, ACT, REW)
    assert all(torch.equal(a, b) for a, b in zip(before, agent.model.parameters())) and agent.sanity.skipped == 2
    endless = PWM(small(FlowWorldModel), sanity=SanityChecks(patience=0))
    for _ in range(30):
        endless.update_wm(OBS, ACT, BAD)
    assert endless.update_wm(OBS, ACT, REW)["updated"] == 1


def test_latents_that_run_away_are_skipped_and_logged(caplog):
    model = small(FlowWorldModel)
    with torch.no_grad():
        model.dynamics_network.last.weight.mul_(1e6)
    wild = PWM(model)
    with caplog.at_level(logging.WARNING):
        found = wild.update_wm(OBS, ACT, REW)
    assert found["largest_latent"] > 100 and found["updated"] == 0 and "update skipped (latent)" in caplog.text
    assert wild.sanity.counts == {"nan": 0, "gradient": 0, "latent": 1}


@pytest.mark.parametrize("weight", [1e-4, 1.0, 1e6])
def test_the_limit_of_the_gradient_follows_the_weight_of_the_loss(weight):
    """An absolute one skipped every update of a large weight, and none of a small one."""
    agent = PWM(small(ResidualWorldModel), dynamics_weight=20 * weight, reward_weight=0.1 * weight)
    for _ in range(FEWEST):
        assert agent.update_wm(OBS, ACT, REW)["updated"] == 1
    agent.weights = (2e4 * weight, 100 * weight)
    assert agent.update_wm(OBS, ACT, REW)["updated"] == 0
    assert agent.sanity.counts["gradient"] == 1


def test_the_first_norms_are_not_judged_and_skipped_ones_are_not_learned_from():
    checks = SanityChecks()
    assert all(judged(checks, *([1.0, 1e5] * (FEWEST // 2))))
    checks = SanityChecks()
    judged(checks, *[1.0] * FEWEST)
    for _ in range(5 * WINDOW):
        assert judged(checks, 101.0, 1.0, 100.0, 1.0) == [False, True, True, True]
    assert checks.counts["gradient"] == 5 * WINDOW and max(checks.norms) == 100


def test_norms_that_grow_go_on_at_their_own_level():
    """Skipped updates change no parameters, so norms that stay large are the model's own."""
    checks = SanityChecks()
    judged(checks, *[1.0] * WINDOW)
    made = judged(checks, *[3e3] * 50)
    assert made == [False] * 5 + [True] * 45  # 2**5 * 100 > 3000
    assert judged(checks, 2e5, 4e5) == [True, False], "and 100 times the new level is the limit now"
    checks = SanityChecks()
    growing = judged(checks, *(1.2**k for k in range(600)))
    assert not checks.stopped and sum(growing) > 550


def test_an_explosion_ends_the_training():
    checks = SanityChecks()
    judged(checks, *[1.0] * WINDOW)
    assert not any(judged(checks, *[1e9] * 20)) and checks.stopped


def test_gradients_of_zero_set_no_limit():
    checks = SanityChecks()
    assert all(judged(checks, *[0.0] * WINDOW, 1.0, 1e3))


def test_without_patience_no_number_of_skipped_updates_overflows():
    checks = SanityChecks(patience=0)
    judged(checks, *[1.0] * FEWEST, *[float("inf")] * 3000)
    assert judged(checks, 1e300) == [True]


def test_a_resume_judges_like_an_unbroken_run():
    draw = random.Random(0)
    norms = [10 ** draw.uniform(0, 3.5) for _ in range(400)]
    whole = SanityChecks()
    expected = judged(whole, *norms)
    assert 0 < expected.count(False) < 200
    for cut in (5, 150, expected.index(False) + 1):
        first, second = SanityChecks(), SanityChecks()
        judged(first, *norms[:cut])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert judged(second, *norms[cut:]) == expected[cut:] and second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("max_latent is 0; give a number above 0, inf for no limit", {"max_latent": 0}),
        ("max_gradient_ratio is nan", {"max_gradient_ratio": float("nan")}),
        ("patience is -1", {"patience": -1}),
    ],
)
def test_wrong_limits_are_named(message, options):
    with pytest.raises(ValueError, match=message):
        SanityChecks(**options)
