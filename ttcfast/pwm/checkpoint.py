"""World models on disk: one safetensors file with the weights and the configuration to rebuild the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError

from .algorithms import PWM
from .algorithms.actor_critic import ActorCritic, AgentConfig

_KIND, _AGENT = "world_model", "agent"


def save_world_model(path: str | os.PathLike[str], agent: PWM, alg: Mapping[str, Any], sizes: Mapping[str, Any], **more: Any) -> None:
    """Write the weights of ``agent.model`` atomically, with the ``alg`` group and the sizes given to ``PWM.from_config``.

    ``more`` is stored beside them, as JSON.
    """
    checkpoints.save(path, agent.model.state_dict(), {"architecture": _KIND, "alg": dict(alg), "sizes": dict(sizes), **more})


def load_world_model(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> PWM:
    """Return the agent of a checkpoint of ``ttcfast train_wm``, with its trained model and a fresh optimizer.

    A checkpoint names the classes of its model and loss. Classes of ttcfast are known, your own after
    :func:`ttcfast.pwm.utils.targets.register`; no module is imported because a file names it.

    Raises:
        CheckpointError: The file is missing or damaged, is not a world model, or names a class or architecture that cannot be built.
    """
    tensors, meta = checkpoints.load(path, {"architecture": _KIND})
    try:
        agent = PWM.from_config(meta["alg"], **meta["sizes"])
    except (ArgumentError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} describes a world model that this version cannot build ({error})") from error
    agent.model.to(device)
    checkpoints.load_weights(agent.model, tensors, path)
    return agent


def save_agent(
    path: str | os.PathLike[str],
    agent: PWM,
    policy: ActorCritic,
    alg: Mapping[str, Any],
    sizes: Mapping[str, Any],
    config: Mapping[str, Any],
    **more: Any,
) -> None:
    """Write world model, actor and critic atomically, with what :func:`load_agent` needs to rebuild them; ``more`` is stored as JSON."""
    tensors = {f"model.{name}": tensor for name, tensor in agent.model.state_dict().items()}
    for place, module in policy.modules().items():
        tensors |= {f"{place}.{name}": tensor for name, tensor in module.state_dict().items() if place != "target"}
    about = {"alg": dict(alg), "sizes": dict(sizes), "agent": dict(config), "unit": policy.unit, **more}
    checkpoints.save(path, tensors, {"architecture": _AGENT, **about})


def load_agent(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> ActorCritic:
    """Return the agent of a checkpoint of ``ttcfast train_policy``: ``agent.act(agent.model.encode(obs))`` acts.

    Raises:
        CheckpointError: The file is missing or damaged, is not an agent, or names a class or architecture that cannot be built.
    """
    tensors, meta = checkpoints.load(path, {"architecture": _AGENT})
    try:
        model = PWM.from_config(meta["alg"], **meta["sizes"]).model
        config = AgentConfig(**meta["agent"])
        found = ActorCritic(model, config, reward_scale=meta["unit"] * (1 - config.gamma), seed=meta["seed"])
    except (ArgumentError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} describes an agent that this version cannot build ({error})") from error
    for place, module in (("model", model), ("actor", found.actor), ("critic", found.critic), ("target", found.target)):
        held = "critic" if place == "target" else place
        weights = {name.removeprefix(f"{held}."): tensor for name, tensor in tensors.items() if name.startswith(f"{held}.")}
        checkpoints.load_weights(module, weights, path)
    model.to(device)
    return found.to(device)
