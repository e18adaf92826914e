"""Playing an agent by its policy and by plans."""

from __future__ import annotations

import pytest
import torch

from tests.replays import M, N
from ttcfast.pwm import PWM
from ttcfast.pwm.algorithms import AgentConfig
from ttcfast.pwm.envs import EnvPool
from ttcfast.pwm.evaluation.play import play
from ttcfast.pwm.models import ResidualWorldModel


class Rotation:
    """The system of ``tests.replays``, rewarded for a small second entry."""

    name, observation_dim, action_dim, episode_length = "rotation", 3, 1, 8

    def reset(self, seed: int):
        self.left, self.x = self.episode_length, torch.randn(3, generator=torch.Generator().manual_seed(seed)).double()
        return self.x.float().numpy()

    def step(self, action):
        self.left -= 1
        self.x = M @ self.x + N @ torch.as_tensor(action).double()
        return self.x.float().numpy(), -float(self.x[1] ** 2), self.left == 0


class ExactModel(ResidualWorldModel):
    """The same as a world model."""

    def next(self, z, a, task=None):
        return (z.double() @ M.T + a.double() @ N.T).to(z)

    def reward(self, z, a, task=None):
        return -self.next(z, a)[..., 1:2].square()


@pytest.fixture
def agent() -> PWM:
    torch.manual_seed(0)
    found = PWM(ExactModel(3, 1, latent_dim=None, units=(8,), encoder={"last_layer": "identity"}, num_bins=None))
    found.add_policy(AgentConfig(actor={"units": [8]}, critic={"units": [8]}))
    return found


def test_plans_with_an_exact_model_beat_an_untrained_policy(agent):
    with EnvPool([Rotation] * 2) as pool:
        policy = play(agent, pool, [1, 2, 3])
        planned = play(agent, pool, [1, 2, 3], {"horizon": 4, "samples": 64, "iterations": 3})
        alone = play(agent, pool, [1, 2, 3], {"horizon": 4, "samples": 64, "iterations": 3}, warm=False)
    assert planned.mean > policy.mean + 0.1 and alone.mean > policy.mean + 0.1
    assert policy.evaluations == 0 and planned.evaluations > 4 * 64 and planned.seconds > 0
    assert torch.isfinite(planned.rollouts.returns).all()


def test_an_agent_without_a_policy_plans_alone(agent):
    agent.policy = None
    with EnvPool([Rotation]) as pool:
        with pytest.raises(ValueError, match="no policy; give warm=False"):
            play(agent, pool, [1], {"horizon": 2, "samples": 8})
        with pytest.raises(ValueError, match="add_policy"):
            play(agent, pool, [1])
        assert play(agent, pool, [1], {"horizon": 2, "samples": 8}, warm=False).evaluations > 0
