"""The endpoint error that arms are compared by: right where it is known, the same for models that differ by their latent space alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.replays import M, earn, episode, move
from ttcfast.data.replay import ReplaySet, Windows
from ttcfast.data.replay_shard import ReplayShard, write_shard
from ttcfast.pwm.evaluation.imagination import ImaginationErrors, Probe, Scale, fit_probe, imagination_errors, persistence
from ttcfast.runtime.errors import DataError

HORIZON = 6


class Linear(nn.Module):
    """Encodes an observation by an invertible map into its latent space and moves there as the system does, plus ``offset`` a step."""

    group, task_embedding = 0, None

    def __init__(self, mix: Tensor, offset: Tensor | None = None) -> None:
        super().__init__()
        self.mix, self.back = nn.Parameter(mix), torch.linalg.inv(mix)
        self.offset = torch.zeros(3, dtype=torch.float64) if offset is None else offset

    def encode(self, obs: Tensor, task: Tensor | None = None) -> Tensor:
        return obs[..., :3].double() @ self.mix

    def next(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> Tensor:
        return (move(z @ self.back, a) + self.offset) @ self.mix

    def step(self, z: Tensor, a: Tensor, task: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.next(z, a), earn(z @ self.back, a)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ReplaySet:
    path = tmp_path_factory.mktemp("replays") / "a.pt"
    write_shard(path, [episode(i, padding=2) for i in range(20)], {})
    return ReplaySet([ReplayShard(path)])


@pytest.fixture(scope="module")
def parts(data) -> tuple[Scale, Windows, Windows]:
    """The scale, windows to fit the probe on, and held-out windows."""
    train, held = data.split(0.3)
    return Scale.of(train), train.windows(*train.grid(1, 1), 1), held.windows(*held.grid(HORIZON, 3), HORIZON)


def errors_of(model: Linear, parts: tuple[Scale, Windows, Windows]) -> ImaginationErrors:
    scale, probing, held = parts
    return imagination_errors(model, fit_probe(model, probing, scale), held, scale)


IDENTITY = torch.eye(3, dtype=torch.float64)
ROTATION = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q


def test_a_perfect_model_has_no_error(parts):
    found = errors_of(Linear(IDENTITY), parts)
    assert len(found.observation) == len(found.reward) == len(found.latent) == HORIZON
    assert max(*found.observation, *found.reward, *found.latent) < 1e-10 and found.unread < 1e-4


def test_a_known_error_is_found_step_by_step(parts):
    offset = torch.tensor([0.05, 0.0, -0.02], dtype=torch.float64)
    found = errors_of(Linear(IDENTITY, offset), parts)
    drift, spread = torch.zeros(3, dtype=torch.float64), parts[0].std[:3]
    variance = parts[2].obs[..., :3].double().flatten(0, 1).var(0, correction=0).mean()
    for h in range(HORIZON):
        expected_reward = float(drift[0] ** 2) / float(parts[2].rew.double().var(correction=0))
        assert found.reward[h] == pytest.approx(expected_reward, rel=1e-4, abs=1e-12)
        drift = M @ drift + offset
        assert found.observation[h] == pytest.approx(float((drift / spread).square().mean()), rel=0.01)
        assert found.latent[h] == pytest.approx(float(drift.square().mean() / variance), rel=1e-4)


def test_the_latent_space_has_no_part_in_it(parts):
    """The same mistake in another latent space is the same error, though the error in the model's own space is not."""
    offset = torch.tensor([0.05, 0.0, -0.02], dtype=torch.float64)
    plain = errors_of(Linear(IDENTITY, offset), parts)
    for mix in (3 * ROTATION, ROTATION @ torch.diag(torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64))):
        other = errors_of(Linear(mix, offset), parts)
        assert other.observation == pytest.approx(plain.observation, rel=0.02) and other.reward == pytest.approx(plain.reward, rel=1e-6)
    assert other.latent[-1] != pytest.approx(plain.latent[-1], rel=0.1)


def test_an_encoder_that_encodes_nothing_is_seen(parts):
    class Blind(Linear):
        def encode(self, obs, task=None):
            return 0 * super().encode(obs)

        def next(self, z, a, task=None):
            return z

    found = errors_of(Blind(IDENTITY), parts)
    assert max(found.observation) == 0, "nothing is easy to predict"
    assert found.unread == pytest.approx(float(parts[0].encode(parts[2].obs).square().mean()), rel=0.01)


def test_persistence_copies_the_first_observation_and_reward(parts):
    scale, _, held = parts
    found = persistence(held, scale)
    change = (held.obs[4] - held.obs[0]).double()[:, :3] / scale.std[:3]
    assert found.observation[3] == pytest.approx(float(change.square().mean()), rel=1e-6)
    missed = (held.rew[4] - held.rew[0]).double().square().mean() / held.rew.double().var(correction=0)
    assert found.reward[4] == pytest.approx(float(missed), rel=1e-6)
    assert found.reward[0] != found.reward[0], "there is no reward before the first"


def test_entries_that_never_change_have_no_part(parts, data, tmp_path):
    scale = parts[0]
    assert data.observation_dim == 5 and scale.encode(data[0].obs).shape[-1] == 3
    write_shard(tmp_path / "still.pt", [type(e)(e.obs * 0 + 7, e.act, e.rew) for e in (episode(0), episode(1))], {})
    with pytest.raises(DataError, match="no entry of the observations changes"):
        Scale.of(ReplaySet.open(tmp_path))


def test_the_probe_is_the_ridge_regression():
    g = torch.Generator().manual_seed(0)
    z, x = torch.randn(50, 4, generator=g, dtype=torch.float64), torch.randn(50, 2, generator=g, dtype=torch.float64)
    probe = Probe.fit(z, x, ridge=0.1)
    centred, wanted = z - z.mean(0), x - x.mean(0)
    penalty = 0.1 * float(centred.square().sum(0).mean())
    stacked = torch.cat([centred, penalty**0.5 * torch.eye(4, dtype=torch.float64)])
    least = torch.linalg.lstsq(stacked, torch.cat([wanted, torch.zeros(4, 2, dtype=torch.float64)])).solution
    assert torch.allclose(probe(z), centred @ least + x.mean(0), atol=1e-10)
