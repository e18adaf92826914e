import pytest
import torch

from tests.pwm.planning.analytic_models import GAMMA, Broken, DoubleIntegrator, Stationary
from ttcfast.pwm.planning import METHODS, Planner, plan
from ttcfast.runtime.errors import ArgumentError

MODEL = DoubleIntegrator()
BEST = Stationary()
Z = torch.tensor([[1.0, 0.0], [-0.5, 0.5], [0.3, -0.6]])


@pytest.mark.parametrize("method", METHODS)
def test_the_integrator_is_brought_to_rest(method):
    planner = Planner(MODEL, horizon=10, samples=32, method=method, gamma=GAMMA, iterations=2, temperature=20.0, width=4, value=BEST.value)
    planner.reset(3)
    z = Z
    for _ in range(40):
        z, _ = MODEL.step(z, planner.act(z))
    assert z.abs().amax() < 0.12
    assert planner.actions == 120 and planner.seconds > 0 and planner.fallbacks == 0
    assert planner.last is not None and planner.evaluations > planner.last.evaluations > 3 * 10 * 32


def test_each_plan_starts_from_the_last_one_shifted():
    planner = Planner(MODEL, horizon=5, samples=16, gamma=GAMMA, iterations=1)
    planner.reset(3)
    planner.act(Z)
    shifted = torch.cat([planner.last.actions[:, 1:], torch.full((3, 1, 1), torch.nan)], 1)
    planner.act(Z)
    expected = plan(MODEL, Z, 5, 16, gamma=GAMMA, iterations=1, warm=shifted, step=1)
    assert torch.equal(planner.last.actions, expected.actions)


def test_an_ended_episode_is_forgotten_alone_and_a_reset_begins_again():
    planner = Planner(MODEL, horizon=5, samples=16, gamma=GAMMA, iterations=1)
    planner.reset(3)
    first = planner.act(Z)
    warm = torch.cat([planner.last.actions[:, 1:], torch.full((3, 1, 1), torch.nan)], 1)
    planner.forget(torch.tensor([False, True, False]))
    planner.act(Z)
    cold, warmed = (plan(MODEL, Z, 5, 16, gamma=GAMMA, iterations=1, warm=w, step=1) for w in (torch.full_like(warm, torch.nan), warm))
    assert torch.equal(planner.last.actions[1], cold.actions[1])
    assert torch.equal(planner.last.actions[::2], warmed.actions[::2])
    planner.reset(3)
    assert torch.equal(planner.act(Z), first)


def test_planning_beats_a_poor_policy_and_keeps_the_best_one():
    def earned(act):
        z, total = Z / 3, 0.0
        for t in range(30):
            z, reward = MODEL.step(z, act(z))
            total = total + GAMMA**t * reward[:, 0]
        return total

    def poor(z):
        return 0.3 * BEST.policy(z)

    for policy, gain in ((poor, 1e-3), (BEST.policy, -1e-3)):
        planner = Planner(MODEL, horizon=8, samples=64, policy=policy, value=BEST.value, gamma=GAMMA, temperature=20.0)
        planner.reset(3)
        assert (earned(planner.act) > earned(policy) + gain).all()


def test_fallbacks_are_counted():
    planner = Planner(Broken(torch.nan, -2.0), horizon=3, samples=8, policy=lambda z: z[..., :1])
    planner.reset(3)
    for _ in range(2):
        torch.testing.assert_close(planner.act(Z), Z[:, :1])
    assert planner.fallbacks == 6


def test_wrong_arguments():
    with pytest.raises(ArgumentError, match="samples is 0"):
        Planner(MODEL, horizon=3, samples=0)
    planner = Planner(MODEL, horizon=3, samples=8)
    with pytest.raises(ArgumentError, match=r"reset for 0 environments; call reset\(3\) first"):
        planner.act(Z)
    planner.reset(2)
    with pytest.raises(ArgumentError, match=r"z has 3 rows .* reset for 2"):
        planner.act(Z)
    with pytest.raises(ArgumentError, match=r"ended is torch.float32 \(2,\); give bool \[2\]"):
        planner.forget(torch.zeros(2))
