"""World models on disk: one safetensors file with the weights and the configuration to rebuild the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError

from .algorithms import PWM
from .algorithms.actor_critic import ActorCritic, AgentConfig

WORLD_MODEL, _AGENT = "world_model", "agent"


def save_world_model(path: str | os.PathLike[str], agent: PWM, alg: Mapping[str, Any], sizes: Mapping[str, Any], **more: Any) -> None:
    """Write the weights of ``agent.model`` atomically, with the ``alg`` group and the sizes given to ``PWM.from_config``.

    ``more`` is stored beside them, as JSON.
    """
    checkpoints.save(path, agent.model.state_dict(), {"architecture": WORLD_MODEL, "alg": dict(alg), "sizes": dict(sizes), **more})


def load_world_model(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> PWM:
    """Return the agent of a checkpoint of ``ttcfast train_wm``, with its trained model and a fresh optimizer.

    A checkpoint names the classes of its model and loss. Classes of ttcfast are known, your own after
    :func:`ttcfast.pwm.utils.targets.register`; no module is imported because a file names it.

    Raises:
        CheckpointError: The file is missing or damaged, is not a world model, or names a class or architecture that cannot be built.
    """
    return world_model_of(*checkpoints.load(path, {"architecture": WORLD_MODEL}), path, device=device)


def world_model_of(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> PWM:
    """Return the agent that the contents of a checkpoint describe; see :func:`load_world_model`."""
    try:
        agent = PWM.from_config(meta["alg"], **meta["sizes"])
    except (ArgumentError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} describes a world model that this version cannot build ({error})") from error
    agent.model.to(device)
    checkpoints.load_weights(agent.model, tensors, path)
    return agent


def save_agent(path: str | os.PathLike[str], agent: PWM, alg: Mapping[str, Any], sizes: Mapping[str, Any], **more: Any) -> None:
    """Write world model, actor and critic atomically, with what :func:`load_agent` needs to rebuild them; ``more`` is stored as JSON.

    Raises:
        ValueError: The agent has no policy.
    """
    policy = agent.policy
    if policy is None:
        raise ValueError("agent has no policy; call add_policy() first, or save_world_model for the model alone")
    tensors = {f"{place}.{name}": t for place, module in _parts(agent, policy).items() for name, t in module.state_dict().items()}
    about = {"alg": dict(alg), "sizes": dict(sizes), "agent": asdict(policy.config), "unit": policy.unit, **more}
    checkpoints.save(path, tensors, {"architecture": _AGENT, **about})


def load_agent(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> PWM:
    """Return the agent of a checkpoint of ``ttcfast train_policy``, with fresh optimizers; ``agent.act(obs)`` acts.

    Raises:
        CheckpointError: The file is missing or damaged, is not an agent, or names a class or architecture that cannot be built.
    """
    return agent_of(*checkpoints.load(path, {"architecture": _AGENT}), path, device=device)


def agent_of(
    tensors: Mapping[str, Tensor], meta: Mapping[str, Any], path: str | os.PathLike[str], *, device: str | torch.device = "cpu"
) -> PWM:
    """Return the agent that the contents of a checkpoint describe; see :func:`load_agent`."""
    try:
        agent = PWM.from_config(meta["alg"], **meta["sizes"])
        agent.model.to(device)
        config = AgentConfig(**meta["agent"])
        told = {"seed": meta.get("seed", 0), "task": meta["task"] if agent.model.task_embedding is not None else None}
        policy = agent.add_policy(config, reward_scale=meta["unit"] * (1 - config.gamma), **told)
    except (ArgumentError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} describes an agent that this version cannot build ({error})") from error
    for place, module in _parts(agent, policy).items():
        weights = {name.removeprefix(f"{place}."): tensor for name, tensor in tensors.items() if name.startswith(f"{place}.")}
        checkpoints.load_weights(module, weights, path)
    policy.target.load_state_dict(policy.critic.state_dict())
    return agent


def _parts(agent: PWM, policy: ActorCritic) -> dict[str, nn.Module]:
    return {"model": agent.model, "actor": policy.actor, "critic": policy.critic}
