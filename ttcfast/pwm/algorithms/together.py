"""Trains several agents that differ in their random seeds by one forward and backward pass for all."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ttcfast.pwm.models.base import BaseWorldModel
from ttcfast.pwm.models.layers import Network

from .actor_critic import ActorCritic
from .dynamics_loss import FlowMatchingDynamicsLoss
from .flat_adam import Stack, share
from .pwm import PWM, judged

Module = TypeVar("Module", bound=nn.Module)


class RandomStream:
    """torch's global random numbers as one of several runs sees them that take turns; it begins where they are now."""

    def __init__(self) -> None:
        self._state = _random_state()

    @contextmanager
    def own(self) -> Iterator[None]:
        """Draw from this stream within the block."""
        outside = _random_state()
        _set_random_state(self._state)
        try:
            yield
        finally:
            self._state = _random_state()
            _set_random_state(outside)


class Together:
    """Several agents of one configuration as one stack of networks, with an axis of size S before that of the batch.

    What is each agent's own stays so: batches, noise, learning rates, clipping, moments, skipped updates. Its numbers are those of training
    it alone, up to rounding; on a CPU the weights are equal to the last bit. The agents' parameters are moved to shared memory and remain
    theirs: saving, evaluating and going on alone need nothing else.

    Args:
        agents: Agents with policies, of a configuration that :func:`can_stack` accepts.
        streams: Stream of each agent, from which flow matching draws its times.

    Raises:
        ValueError: An agent has no policy, cannot be stacked, or has another configuration than the first.
    """

    def __init__(self, agents: Sequence[PWM], streams: Sequence[RandomStream]) -> None:
        _require_alike(agents)
        self.agents, self._streams = list(agents), list(streams)
        self._policies = [agent.policy for agent in agents if agent.policy is not None]
        self._wm_optimizer = Stack([agent.wm_optimizer for agent in agents])
        first = self._joint = copy.copy(agents[0])
        first.model = stacked(first.model, self._wm_optimizer.views)
        if isinstance(first.dynamics_loss, FlowMatchingDynamicsLoss):
            first.dynamics_loss = copy.copy(first.dynamics_loss)
            first.dynamics_loss.times = self._times  # type: ignore[method-assign]
        self._policy = _Policies(self._policies, first.model)

    def update_wm(self, obs: Tensor, act: Tensor, rew: Tensor) -> list[dict[str, float]]:
        """Make one update of every agent's world model, on ``[H + 1, S, B, observation_dim]`` and so on, as :meth:`PWM.update_wm` does."""
        for agent in self.agents:
            agent.sanity.require_running()
        loss = self._joint.compute_wm_loss(obs, act, rew)
        gradients = torch.autograd.grad(loss.total.sum(), self._wm_optimizer.views, allow_unused=True)
        norms = self._wm_optimizer.collect(gradients, self._joint.clip)
        return judged(self.agents, torch.stack([t.detach() for t in loss[:5]]), norms)

    def update_policy(self, obs: Tensor, step: int, *, progress: float = 0.0) -> list[dict[str, float]]:
        """Make one update of every agent's policy, from ``obs [S, B, observation_dim]``, as :meth:`PWM.update_policy` does."""
        for agent in self.agents:
            agent.sanity.require_running()
        with torch.no_grad():
            z = self._joint.model.encode(obs)
        return self._policy._update(self._policies, z, step, progress, None)

    def _times(self, like: Tensor) -> Tensor:
        """Draw the times of flow matching, ``[H, S, B, 1]``, each agent's from its own stream."""
        found = []
        for agent, stream, own in zip(self.agents, self._streams, like.unbind(1)):
            assert isinstance(agent.dynamics_loss, FlowMatchingDynamicsLoss)
            with stream.own():
                found.append(agent.dynamics_loss.times(own))
        return torch.stack(found, 1)


class _Policies(ActorCritic):
    """The policies of several agents as one, inside their stacked world model."""

    def __init__(self, members: Sequence[ActorCritic], model: BaseWorldModel) -> None:
        first = members[0]
        self.__dict__.update(vars(first), model=model, members=list(members))
        actor, critic = (Stack([getattr(member, name) for member in members]) for name in ("actor_optimizer", "critic_optimizer"))
        self.actor, self.critic = stacked(first.actor, actor.views), stacked(first.critic, critic.views)
        self.target = stacked(first.target, share([list(member.target.parameters()) for member in members])[1])
        self.actor_optimizer, self.critic_optimizer = actor, critic  # type: ignore[assignment]

    def noise(self, batch: int, step: int, device: torch.device | str = "cpu", site: int = 1) -> Tensor:
        members: list[ActorCritic] = vars(self)["members"]
        return torch.stack([member.noise(batch, step, device, site) for member in members], 1)

    def _orders(self, count: int, step: int, device: torch.device) -> Tensor:
        members: list[ActorCritic] = vars(self)["members"]
        return torch.stack([member._orders(count, step, device) for member in members], 1)


def can_stack(agent: PWM) -> bool:
    """Tell whether agents like this one can be trained together: of a single task, with networks that end in linear layers."""
    model = agent.model
    networks = [part for part in model.modules() if isinstance(part, Network)]
    linear = all(isinstance(network.last, nn.Linear) for network in networks)
    return linear and model.task_embedding is None and model._integration() is not None


def _require_alike(agents: Sequence[PWM]) -> None:
    """Raise unless all agents are like the first in everything that is shared here."""
    for number, agent in enumerate(agents):
        if agent.policy is None or agent.policy.task is not None:
            raise ValueError(f"agents[{number}] has no policy, or one of a certain task; call its add_policy() without a task first")
        if not can_stack(agent):
            raise ValueError(f"agents[{number}] has several tasks, or a network that does not end in a linear layer; train it alone")
        first, own = _settings(agents[0]), _settings(agent)
        if other := next((what for what in own if own[what] != first[what]), None):
            raise ValueError(f"agents[{number}] and agents[0] differ in {other}: {own[other]} and {first[other]}; give one configuration")


def _settings(agent: PWM) -> dict[str, Any]:
    """Return by name what agents that train together have in common."""
    model, policy, loss = agent.model, agent.policy, agent.dynamics_loss
    assert policy is not None
    return {
        "the class of the model": type(model).__name__,
        "the model's arguments": model.arguments,
        "the integration": model._integration(),
        "the model's statistics": {name: t.tolist() for name, t in model.named_buffers()},
        "the dynamics loss": (type(loss).__name__, vars(loss)),
        "the settings of the world model's training": (agent.gamma, agent.weights, agent.clip),
        "the policy's settings": policy.config,
        "the unit of the values": policy.unit,
    }


def stacked(module: Module, parameters: Iterable[nn.Parameter]) -> Module:
    """Return a copy of a module with other parameters, such as those of several like it, in the order of ``module.parameters()``."""
    twin = copy.deepcopy(module)
    for (name, _), parameter in zip(module.named_parameters(), parameters):
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, parameter)
    return twin


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
