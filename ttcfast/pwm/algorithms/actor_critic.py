"""Trains a policy inside a world model: first-order gradients through imagined rollouts for the actor, TD(lambda) for the critic."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttcfast.checks import at_least, one_of, whole
from ttcfast.esnr.ratio import ESNR, esnr
from ttcfast.ops import normal
from ttcfast.pwm.models.actor import Actor
from ttcfast.pwm.models.base import BaseWorldModel, Task
from ttcfast.pwm.models.critic import CriticEnsemble
from ttcfast.spec import Key

from .flat_adam import FlatAdam

_SITE_POLICY, _SITE_CRITIC, _SITE_MEASURE = 1, 2, 3  # sites of the keyed noise


@dataclass(frozen=True)
class AgentConfig:
    """Settings of an agent; the defaults are PWM's public ones (``agent/pwm.yaml``).

    Args:
        horizon: H, steps of an imagined rollout.
        gamma: Discount.
        trace: Lambda of TD(lambda).
        actor, critic: Arguments of :class:`ttcfast.pwm.models.actor.Actor` and :class:`ttcfast.pwm.models.critic.CriticEnsemble`.
        actor_lr, critic_lr: Learning rates of Adam, which fall linearly to ``lr_floor`` of themselves.
        lr_floor: Share of the learning rates that is left at the end.
        betas: Decay rates of Adam.
        actor_clip, critic_clip: Largest gradient norms, the actor's of the imagined return in units of the rewards.
        critic_passes, critic_minibatches: Passes over the imagined states per update, and minibatches per pass.
        target_rate: Rate at which the target network follows the critic, per minibatch; 1 for no target network.
        bootstrap: How the actor reads the ensemble at the end of a rollout, ``"min"`` or ``"mean"``; the critic's targets take the minimum.
        detach: Whether the policy sees latents without their gradient, so that gradients reach actions through the dynamics alone, as in
            PWM. It biases the gradient.
    """

    horizon: int = 16
    gamma: float = 0.99
    trace: float = 0.95
    actor: Mapping[str, Any] = field(default_factory=dict)
    critic: Mapping[str, Any] = field(default_factory=dict)
    actor_lr: float = 5e-4
    critic_lr: float = 5e-4
    lr_floor: float = 0.02
    betas: tuple[float, float] = (0.7, 0.95)
    actor_clip: float = 1.0
    critic_clip: float = 100.0
    critic_passes: int = 8
    critic_minibatches: int = 4
    target_rate: float = 1.0
    bootstrap: str = "min"
    detach: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("horizon", "critic_passes", "critic_minibatches"):
            whole(name, getattr(self, name), 1)
        for name in ("actor_lr", "critic_lr", "actor_clip", "critic_clip"):
            at_least(name, getattr(self, name), 0)
        for name in ("gamma", "trace", "target_rate", "lr_floor"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it lies in (0, 1]")
        one_of("bootstrap", self.bootstrap, ("min", "mean"))


class Imagined(NamedTuple):
    """A rollout of the policy inside the world model; of S policies stacked there is an axis of size S before B.

    One that ends before H steps repeats its last state to the end, with rewards 0 and discounts 1.
    """

    latents: Tensor  # [H + 1, B, latent_dim]
    actions: Tensor  # [H, B, action_dim]
    rewards: Tensor  # [H, B]
    discounts: Tensor | None = None  # [H, B], of what follows each step; None for gamma
    own: Tensor | None = None  # [H, B] bool, whether a step is made, not a repetition; None for all

    def made(self, values: Tensor) -> Tensor:
        """Return those of ``values [H, B, ...]`` that belong to steps that were made, ``[N, ...]``, of S policies ``[S, N, ...]``."""
        if self.own is not None:
            return values[self.own]
        return values.flatten(0, 1) if self.rewards.ndim == 2 else values.movedim(1, 0).flatten(1, 2)

    def each(self, change: Callable[[Tensor], Tensor]) -> Imagined:
        """Return the rollout with every tensor changed."""
        more = (None if x is None else change(x) for x in (self.discounts, self.own))
        return Imagined(change(self.latents), change(self.actions), change(self.rewards), *more)


Imagine = Callable[[Tensor, Tensor], Imagined]


class ActorCritic:
    """An actor and a critic trained inside a world model, whose weights stay as they are.

    Noise is keyed by the random seed and the number of the update, so that a resumed run draws the same and measurements draw nothing from
    the run's own numbers.

    Args:
        model: World model, or anything with its ``latent_dim``, ``action_dim``, ``next``, ``reward``, ``decode_reward``, ``masked`` and
            ``frozen``.
        config: Settings.
        reward_scale: Largest magnitude of a reward; values are learned in units of ``reward_scale / (1 - gamma)``.
        seed: Random seed of the noise.
        task: Task of a model with several.

    Raises:
        ValueError: ``reward_scale`` is not above 0, or gamma is 1.

    Source: Georgiev et al., "PWM", 2024 (arXiv:2407.02466). Departures: the bootstrap is weighed by ``gamma^H``, action masks apply, and
    the world model forms no gradients of its own weights.
    """

    def __init__(
        self, model: BaseWorldModel, config: AgentConfig, *, reward_scale: float = 1.0, seed: int = 0, task: Task | None = None
    ) -> None:
        if not 0 < reward_scale < math.inf:
            raise ValueError(f"reward_scale is {reward_scale}; give a number above 0")
        if config.gamma == 1:
            raise ValueError("gamma is 1; values of endless imagined futures need a discount below 1")
        self.model, self.config, self.seed, self.task = model, config, seed, task
        self.actor = Actor(model.latent_dim, model.action_dim, **config.actor)
        self.critic = CriticEnsemble(model.latent_dim, **config.critic)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self._targets = list(self.target.parameters())
        self.unit = reward_scale / (1 - config.gamma)
        self.actor_optimizer = FlatAdam(self.actor.parameters(), config.actor_lr, config.betas)
        self.critic_optimizer = FlatAdam(self.critic.parameters(), config.critic_lr, config.betas)
        self.skipped = self.skipped_in_a_row = 0

    def to(self, device: str | torch.device) -> ActorCritic:
        """Move the networks to ``device``, before the first update."""
        for module in self.modules().values():
            module.to(device)
        return self

    def modules(self) -> dict[str, nn.Module]:
        """Return actor, critic and target network by name."""
        return {"actor": self.actor, "critic": self.critic, "target": self.target}

    @torch.no_grad()
    def act(self, z: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return actions ``[..., action_dim]`` for latents ``[..., latent_dim]``; without ``noise`` the mean policy's."""
        return self.model.masked(self.actor(z, noise), self.task)

    def value(self, z: Tensor) -> Tensor:
        """Return the critic's discounted return from latents ``[..., latent_dim]``, ``[...]``, in units of the rewards."""
        return self._read(self.critic, z, self.config.bootstrap) * self.unit

    def imagine(self, z: Tensor, noise: Tensor) -> Imagined:
        """Roll the policy out from latents ``z [B, latent_dim]`` with standard normal ``noise [H, B, action_dim]``."""
        states, acted = self._act_out(z, noise)
        rewards = self.model.decode_reward(self.model.reward(states[:-1], acted, self.task))
        return Imagined(states, acted, rewards.squeeze(-1))

    def _act_out(self, z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents ``[H + 1, B, latent_dim]`` and actions ``[H, B, action_dim]``."""
        if isinstance(self.model, BaseWorldModel):
            found = self.model.closed_loop(z, self.actor.offsets(noise), self.actor.network, self.task, detach=self.config.detach)
            if found is not None:
                return torch.cat([z.unsqueeze(0), found[0]]), found[1]
        latents, actions = [z], []
        for eps in noise:
            seen = latents[-1].detach() if self.config.detach else latents[-1]
            actions.append(self.actor(seen, eps))
            latents.append(self.model.next(latents[-1], actions[-1], self.task))
        return torch.stack(latents), torch.stack(actions)

    def returns(self, rollout: Imagined) -> Tensor:
        """Return the discounted return ``[B]`` of imagined rollouts, the critic's value of the last state included, over ``unit``."""
        horizon, gamma = len(rollout.rewards), self.config.gamma
        last = self._read(self.critic, rollout.latents[-1], self.config.bootstrap)
        if rollout.discounts is not None:
            weights = torch.cat([torch.ones_like(rollout.rewards[:1]), rollout.discounts.cumprod(0)])
            return (weights[:-1] * rollout.rewards).sum(0) / self.unit + weights[-1] * last
        discounts = gamma ** torch.arange(horizon, dtype=rollout.rewards.dtype, device=rollout.rewards.device)
        discounts = discounts.unflatten(0, (-1, *[1] * (rollout.rewards.ndim - 1)))
        return (discounts * rollout.rewards).sum(0) / self.unit + gamma**horizon * last

    def actor_loss(self, rollout: Imagined) -> Tensor:
        """Return the loss of the actor, the negative mean return in units of the rewards."""
        return -self.unit * self.returns(rollout).mean(-1)

    def update(self, z: Tensor, step: int, *, progress: float = 0.0, imagine: Imagine | None = None) -> dict[str, float]:
        """Make one update of the actor, and ``critic_passes`` times ``critic_minibatches`` of the critic.

        An update of the actor whose loss or gradient is not finite is skipped and counted in ``skipped``, the critic's with it.

        Args:
            z: Latents where imagined rollouts start, ``[B, latent_dim]``, without gradient.
            step: Number of the update, which keys the noise.
            progress: Share of training done, which lowers the learning rates.
            imagine: What makes the rollout from ``z`` and noise ``[H, B, action_dim]``; None for :meth:`imagine`.

        Returns:
            ``actor_loss`` (the negative imagined return), ``actor_gradient_norm`` (before clipping), ``critic_loss``, ``imagined_reward``
            (mean per step), ``value`` (mean of the rollouts' states), ``action_std``, ``saturation`` (share of actions beyond 0.98) and
            ``actor_updated`` (1 or 0).
        """
        return self._update([self], z, step, progress, imagine)[0]

    def _update(
        self, members: Sequence[ActorCritic], z: Tensor, step: int, progress: float, imagine: Imagine | None
    ) -> list[dict[str, float]]:
        """Update ``members``, whose stacked networks these are, and return what :meth:`update` tells of each."""
        for member in members:
            for optimizer, lr in ((member.actor_optimizer, self.config.actor_lr), (member.critic_optimizer, self.config.critic_lr)):
                optimizer.param_groups[0]["lr"] = lr * max(self.config.lr_floor, 1 - progress)
        loss, gradients, rollout = self.actor_gradients(z, self.noise(z.shape[-2], step, z.device), imagine)
        norm = self.actor_optimizer.collect(gradients, self.config.actor_clip)
        found = torch.stack([loss, norm]).reshape(2, -1).T.tolist()  # waits for the device
        allowed = [all(map(math.isfinite, pair)) for pair in found]
        for member, goes in zip(members, allowed):
            member.skipped, member.skipped_in_a_row = member.skipped + (not goes), 0 if goes else member.skipped_in_a_row + 1
            if goes:
                member.actor_optimizer.step()
        going = [member for member, goes in zip(members, allowed) if goes]
        critic_loss, values = self._update_critic(rollout, step, going) if going else (loss * math.nan, loss * math.nan)
        saturated = (rollout.made(rollout.actions).abs() > 0.98).to(z.dtype).mean((-2, -1))
        reward, std = rollout.made(rollout.rewards).mean(-1), self.actor.std().mean(-1)
        more = torch.stack([critic_loss, reward, values * self.unit, std, saturated]).reshape(5, -1).T.tolist()
        names = ("actor_loss", "actor_gradient_norm", "critic_loss", "imagined_reward", "value", "action_std", "saturation")
        return [{**dict(zip(names, [*a, *b])), "actor_updated": float(goes)} for a, b, goes in zip(found, more, allowed)]

    def actor_gradients(self, z: Tensor, noise: Tensor, imagine: Imagine | None = None) -> tuple[Tensor, list[Tensor], Imagined]:
        """Return the actor's loss, its gradient per parameter of the actor, and the rollout without gradient."""
        with self.model.frozen():
            rollout = (imagine or self.imagine)(z, noise)
            loss = self.actor_loss(rollout)
            gradients = torch.autograd.grad(loss.sum(), list(self.actor.parameters()))
        return loss.detach(), list(gradients), rollout.each(Tensor.detach)

    def noise(self, batch: int, step: int, device: torch.device | str = "cpu", site: int = _SITE_POLICY) -> Tensor:
        """Return the standard normal numbers ``[H, batch, action_dim]`` of update ``step``."""
        rows = torch.stack([torch.arange(batch, device=device), torch.zeros(batch, dtype=torch.int64, device=device)], 1)
        shape = (self.config.horizon, self.model.action_dim)
        return normal(batch, shape, key=Key(self.seed, step, site), rows=rows).transpose(0, 1)

    def targets(self, rollout: Imagined) -> Tensor:
        """Return the TD(lambda) returns ``[H, B]`` of the rollout's states over ``unit``, by the minimum of the target networks."""
        gamma, trace = self.config.gamma, self.config.trace
        with torch.no_grad():
            values = self._read(self.target, rollout.latents[1:], "min")
            discounts = repeat(gamma) if rollout.discounts is None else reversed(rollout.discounts)
            following, found = values[-1], []
            for reward, value, discount in zip(reversed(rollout.rewards / self.unit), reversed(values), discounts):
                following = reward + discount * torch.lerp(value, following, trace)
                found.append(following)
        return torch.stack(found[::-1])

    def measure_esnr(self, z: Tensor, step: int, microbatches: int) -> ESNR:
        """Return the ESNR of the actor's gradient over microbatches of ``z [B, latent_dim]``, leaving the run's numbers as they are.

        Raises:
            ValueError: ``microbatches`` does not divide the batch, or is below 2.
        """
        if microbatches < 2 or len(z) % microbatches:
            raise ValueError(f"microbatches is {microbatches} and the batch {len(z)}; give a divisor of at least 2")
        noise = self.noise(len(z), step, z.device, _SITE_MEASURE)
        parts = zip(z.chunk(microbatches), noise.chunk(microbatches, 1))
        return esnr([self.actor_gradients(part, eps)[1] for part, eps in parts], microbatch_size=len(z) // microbatches)

    def finite_difference_cosine(self, z: Tensor, step: int, *, directions: int = 8, size: float = 1e-4) -> float:
        """Return the cosine between the actor's gradient and finite differences of its imagined return, both in float64.

        It is 1 up to the error of the differences where gradients flow through everything, and lower with ``detach``.

        Args:
            z: Latents where imagined rollouts start, ``[B, latent_dim]``.
            step: Number of the update, which keys the noise.
            directions: Number of random unit directions in the actor's parameters.
            size: Step of the central differences.
        """
        twin = copy.copy(self)
        twin.model, twin.actor = copy.deepcopy(self.model).double(), copy.deepcopy(self.actor).double()
        twin.critic = copy.deepcopy(self.critic).double()
        z, noise = z.double(), self.noise(len(z), step, z.device, _SITE_MEASURE).double()
        gradient = nn.utils.parameters_to_vector(twin.actor_gradients(z, noise)[1])
        here = nn.utils.parameters_to_vector(twin.actor.parameters()).detach()
        along = normal(
            directions, (len(here),), key=Key(self.seed, step, _SITE_MEASURE), rows=torch.tensor([[d, 1] for d in range(directions)])
        )
        along = nn.functional.normalize(along.to(here), dim=1)

        @torch.no_grad()
        def loss(at: Tensor) -> Tensor:
            nn.utils.vector_to_parameters(at, twin.actor.parameters())
            return -twin.unit * twin.returns(twin.imagine(z, noise)).mean()

        differences = torch.stack([(loss(here + size * u) - loss(here - size * u)) / (2 * size) for u in along])
        return float(nn.functional.cosine_similarity(differences, along @ gradient, dim=0))

    def state_dict(self) -> dict[str, Any]:
        """Return weights, optimizers and counts, for an exact resume."""
        optimizers = {"actor_optimizer": self.actor_optimizer.state_dict(), "critic_optimizer": self.critic_optimizer.state_dict()}
        return {
            **{name: module.state_dict() for name, module in self.modules().items()},
            **optimizers,
            "skipped": [self.skipped, self.skipped_in_a_row],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        for name, module in self.modules().items():
            module.load_state_dict(state[name])
        self.actor_optimizer.load_state_dict(state["actor_optimizer"])
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.skipped, self.skipped_in_a_row = map(int, state["skipped"])

    def _update_critic(self, rollout: Imagined, step: int, members: Sequence[ActorCritic]) -> tuple[Tensor, Tensor]:
        """Fit the critics of ``members`` to the rollout's TD(lambda) returns; return the mean loss and the mean return."""
        goals, states = rollout.made(self.targets(rollout)), rollout.made(rollout.latents[:-1])
        optimizer, losses = self.critic_optimizer, []
        for order in self._orders(states.shape[-2], step, states.device):
            picks = (order,) if order.ndim == 1 else (torch.arange(len(order), device=order.device).unsqueeze(1), order)
            chosen = (t[picks] for t in (states, goals))
            for some, of_some in zip(*(t.chunk(self.config.critic_minibatches, order.ndim - 1) for t in chosen)):
                loss = (self.critic(some) - of_some).square().mean((0, -1))
                optimizer.collect(torch.autograd.grad(loss.sum(), optimizer.views), self.config.critic_clip)
                for member in members:
                    member.critic_optimizer.step()
                    member.follow()
                losses.append(loss.detach())
        return torch.stack(losses).mean(0), goals.mean(-1)

    def _orders(self, count: int, step: int, device: torch.device) -> Tensor:
        """Return the order in which each pass of update ``step`` takes the states, ``[passes, count]``."""
        passes = self.config.critic_passes
        rows = torch.arange(passes, device=device).unsqueeze(1).expand(-1, 2)
        return normal(passes, (count,), key=Key(self.seed, step, _SITE_CRITIC), rows=rows).argsort(1)

    def follow(self) -> None:
        """Move the target network towards the critic."""
        slow, fast = ([p.detach() for p in parameters] for parameters in (self._targets, self.critic_optimizer.views))
        torch._foreach_lerp_(slow, fast, self.config.target_rate)

    def _read(self, network: nn.Module, z: Tensor, how: str) -> Tensor:
        values = network(z)
        return values.amin(0) if how == "min" else values.mean(0)
