"""The agent of ``ttcfast.pwm.algorithms`` as one writes it in plain PyTorch: modules, loops, ``torch.optim.Adam``. The peer of bench_agent.

It trains one model with one policy, on the same losses; it keeps no counts, checks no sanity and cannot be resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MLP(nn.Module):
    """Linear, LayerNorm and Mish, and a linear layer."""

    def __init__(self, inputs: int, units: Sequence[int], outputs: int) -> None:
        super().__init__()
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise((inputs, *units)))
        self.norms = nn.ModuleList(nn.LayerNorm(u) for u in units)
        self.last = nn.Linear(units[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.hidden, self.norms):
            x = F.mish(norm(linear(x)))
        return self.last(x)


class WorldModel(nn.Module):
    """Encoder, dynamics and two-hot reward on plain latents.

    Args:
        kind: ``"mlp"``, ``"residual"``, or ``"heun"`` for a flow integrated by ``substeps`` of Heun.
        sizes: observation, action, latent.
        units, encoder_units: Hidden layers of dynamics and reward, and of the encoder.
    """

    def __init__(self, kind: str, sizes: tuple[int, int, int], units: Sequence[int], encoder_units: Sequence[int], substeps: int) -> None:
        super().__init__()
        observation, action, latent = sizes
        self.kind, self.substeps = kind, substeps
        self.encoder = MLP(observation, encoder_units, latent)
        self.dynamics = MLP(latent + action + (kind == "heun"), units, latent)
        self.head = MLP(latent + action, units, 101)
        self.register_buffer("mean", torch.zeros(observation))
        self.register_buffer("std", torch.ones(observation))
        self.register_buffer("bins", torch.linspace(-10, 10, 101))

    def encode(self, obs: Tensor) -> Tensor:
        return self.encoder((obs - self.mean) / self.std)

    def velocity(self, z: Tensor, a: Tensor, tau: Tensor) -> Tensor:
        return self.dynamics(torch.cat([z, a, tau], -1))

    def next(self, z: Tensor, a: Tensor) -> Tensor:
        if self.kind == "mlp":
            return self.dynamics(torch.cat([z, a], -1))
        if self.kind == "residual":
            return z + self.dynamics(torch.cat([z, a], -1))
        step = 1 / self.substeps
        for k in range(self.substeps):
            k1 = self.velocity(z, a, torch.full_like(a[..., :1], k * step))
            k2 = self.velocity(z + step * k1, a, torch.full_like(a[..., :1], (k + 1) * step))
            z = z + step / 2 * (k1 + k2)
        return z

    def logits(self, z: Tensor, a: Tensor) -> Tensor:
        return self.head(torch.cat([z, a], -1))

    def reward(self, z: Tensor, a: Tensor) -> Tensor:
        x = (self.logits(z, a).softmax(-1) * self.bins).sum(-1)
        return torch.sign(x) * torch.expm1(x.abs())

    def reward_loss(self, z: Tensor, a: Tensor, reward: Tensor) -> Tensor:
        """Return the cross-entropy per step, ``[H]``."""
        x = (torch.sign(reward) * torch.log1p(reward.abs())).clamp(-10, 10)
        two_hot = (1 - (x - self.bins).abs() / 0.2).clamp_min(0)
        return -(two_hot * self.logits(z, a).log_softmax(-1)).sum(-1).mean(1)


def world_model_loss(model: WorldModel, obs: Tensor, act: Tensor, rew: Tensor) -> Tensor:
    with torch.no_grad():
        targets = model.encode(obs[1:])
    latents, horizon = [model.encode(obs[0])], len(act)
    for a in act[: horizon - (model.kind == "heun")]:
        latents.append(model.next(latents[-1], a))
    states = torch.stack(latents)
    weights = 0.99 ** torch.arange(horizon, device=obs.device) / horizon
    if model.kind == "heun":
        tau, way = torch.rand(*act.shape[:2], 1, device=obs.device), targets - states
        dynamics = (model.velocity(states + tau * way, act, tau) - way).square().mean((1, 2))
    else:
        dynamics = (states[1:] - targets).square().mean((1, 2))
    return 20 * (weights * dynamics).sum() + (weights * model.reward_loss(states[:horizon], act, rew)).sum()


def actor_loss(agent: Agent, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and latents and rewards of the rollout without gradient."""
    latents, actions, std = [z], [], agent.log_std.clamp_min(agent.lowest).exp()
    for eps in noise:
        actions.append(torch.tanh(agent.actor(latents[-1]) + std * eps))
        latents.append(agent.model.next(latents[-1], actions[-1]))
    states = torch.stack(latents)
    rewards, horizon = agent.model.reward(states[:-1], torch.stack(actions)), len(noise)
    discounts = 0.99 ** torch.arange(horizon, device=z.device)
    last = torch.stack([critic(states[-1])[..., 0] for critic in agent.critics]).mean(0)
    return -(discounts @ rewards + agent.unit * 0.99**horizon * last).mean(), states.detach(), rewards.detach()


def critic_loss(agent: Agent, states: Tensor, goals: Tensor) -> Tensor:
    return torch.stack([(critic(states)[..., 0] - goals).square().mean() for critic in agent.critics]).mean()


class Agent:
    """A world model and a policy, with a method for an update of each.

    Args:
        model: World model.
        latent, action: Sizes.
        units: Hidden layers of actor and critics.
        unit: Unit of the values.
        wrap: Applied to the three losses, such as ``torch.compile``.
    """

    def __init__(
        self,
        model: WorldModel,
        latent: int,
        action: int,
        units: Sequence[int],
        unit: float,
        wrap: Callable[[Callable[..., object]], Callable[..., object]] = lambda f: f,
    ) -> None:
        self.model, self.unit, self.lowest = model, unit, -1.4271163556401458
        self.actor, self.log_std = MLP(latent, units, action), nn.Parameter(torch.full((action,), -1.0))
        self.critics, self.targets = (nn.ModuleList(MLP(latent, units, 1) for _ in range(2)) for _ in range(2))
        self.targets.requires_grad_(False)
        self.losses = [wrap(loss) for loss in (world_model_loss, actor_loss, critic_loss)]

    def start(self, device: str) -> Agent:
        """Move everything to ``device`` and make the optimizers, in the setting that was fastest on the CPU of the three that Adam has."""
        for module in (self.model, self.actor, self.critics, self.targets):
            module.to(device)
        self.log_std = nn.Parameter(self.log_std.detach().to(device))
        self.of_actor = [*self.actor.parameters(), self.log_std]

        def adam(parameters: Sequence[nn.Parameter], lr: float) -> torch.optim.Adam:
            return torch.optim.Adam(parameters, lr, betas=(0.7, 0.95), fused=True)

        self.optimizers = (
            adam(list(self.model.parameters()), 2e-3),
            adam(self.of_actor, 3e-3),
            adam(list(self.critics.parameters()), 1e-3),
        )
        return self

    def update_wm(self, obs: Tensor, act: Tensor, rew: Tensor) -> tuple[float, float]:
        optimizer = self.optimizers[0]
        optimizer.zero_grad()
        loss = self.losses[0](self.model, obs, act, rew)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 20.0)
        optimizer.step()
        return loss.item(), norm.item()

    def update_policy(self, obs: Tensor, horizon: int) -> tuple[float, float, float]:
        self.model.requires_grad_(False)  # no gradient of its weights is formed
        with torch.no_grad():
            z = self.model.encode(obs)
        _, of_actor, of_critic = self.optimizers
        of_actor.zero_grad()
        loss, states, rewards = self.losses[1](self, z, torch.randn(horizon, len(z), len(self.log_std), device=z.device))
        loss.backward(inputs=self.of_actor)
        norm = nn.utils.clip_grad_norm_(self.of_actor, 1.0)
        of_actor.step()
        self.model.requires_grad_(True)
        goals, starts, total = self.goals(states, rewards).flatten(), states[:-1].flatten(0, 1), 0.0
        for picks in torch.randperm(len(starts), device=z.device).chunk(4):
            of_critic.zero_grad()
            error = self.losses[2](self, starts[picks], goals[picks])
            error.backward()
            nn.utils.clip_grad_norm_(self.critics.parameters(), 100.0)
            of_critic.step()
            with torch.no_grad():
                for slow, fast in zip(self.targets.parameters(), self.critics.parameters()):
                    slow.lerp_(fast, 0.05)
            total += error.item()
        return loss.item(), norm.item(), total

    @torch.no_grad()
    def goals(self, states: Tensor, rewards: Tensor) -> Tensor:
        """Return the TD(lambda) returns ``[H, B]``."""
        values = torch.stack([critic(states[1:])[..., 0] for critic in self.targets]).amin(0)
        following, found = values[-1], []
        for reward, value in zip(reversed(rewards / self.unit), reversed(values)):
            following = reward + 0.99 * (0.05 * value + 0.95 * following)
            found.append(following)
        return torch.stack(found[::-1])
