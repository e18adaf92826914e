"""Sensitivity of models whose Jacobians are known, and gradients against those of the simulator."""

from __future__ import annotations

import pytest
import torch

from tests.pwm.cartpole import UNITS, CartPole
from tests.pwm.small_models import batch, small, stirred
from tests.simulators import needs_dm_control
from ttcfast.pwm.envs import DMControlEnv
from ttcfast.pwm.evaluation.gradients import beside_simulator, model_gradient, sensitivity
from ttcfast.pwm.models import FlowWorldModel, ResidualWorldModel


def test_a_model_that_changes_nothing_has_an_identity_as_jacobian():
    model = small(ResidualWorldModel, encoder={"last_layer": "linear"})
    with torch.no_grad():
        for p in model.dynamics_network.last.parameters():
            p.zero_()
    found = sensitivity(model, *batch(4))
    assert found.dynamics == pytest.approx((1, 1)) and found.action == (0, 0) and found.reward == (0, 0)


def test_sensitivity_is_that_of_the_whole_jacobian():
    model = stirred(small(FlowWorldModel)).double()
    z, a = batch(3, dtype=torch.float64)
    found = sensitivity(model, z, a)
    norms = [
        torch.linalg.matrix_norm(torch.autograd.functional.jacobian(lambda x, i=i: model.next(x[None], a[i : i + 1])[0], z[i]), 2)
        for i in range(3)
    ]
    assert found.dynamics == pytest.approx((float(sum(norms) / 3), float(max(norms))))
    assert all(p.requires_grad for p in model.parameters())


class Exact:
    """The cart-pole in closed form as an agent that swings left and right."""

    gamma = 0.99

    def __init__(self) -> None:
        self.model = CartPole()
        self.model.encode = lambda obs: obs.float() / UNITS

    def rollout(self, z, act):
        latents = [z]
        for a in act:
            latents.append(self.model.next(latents[-1], a))
        return torch.stack(latents)

    def act(self, obs):
        return torch.sin(3 * obs[:, :1] + obs[:, 4:])


@needs_dm_control
def test_gradients_of_an_exact_model_are_the_simulators():
    ours, theirs = beside_simulator(Exact(), DMControlEnv("cartpole-swingup"), seed=3, horizon=8, every=120)
    cosines = torch.nn.functional.cosine_similarity(ours.flatten(1), theirs.flatten(1))
    assert len(cosines) == 5 and float(cosines.median()) > 0.99 and float(cosines.min()) > 0.9  # the last differ at the end of the rail


def test_the_model_gradient_is_that_of_its_return():
    agent, obs = Exact(), torch.tensor([0.1, -0.9, 0.4, 0.2, 0.5])
    actions = torch.tensor([[0.2], [-0.4], [0.1]])
    found = model_gradient(agent, obs, actions, 0.9)

    def value(x):
        z, total = agent.model.encode(obs[None]), 0.0
        for t, a in enumerate(x):
            total, z = total + 0.9**t * agent.model.reward(z, a[None])[0, 0], agent.model.next(z, a[None])
        return total

    for t in range(3):
        step = torch.zeros(3, 1)
        step[t] = 1e-2
        assert float(found[t]) == pytest.approx(float(value(actions + step) - value(actions - step)) / 2e-2, abs=2e-3)
