"""World models on disk: one safetensors file with the weights and the configuration that builds them again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError

from .algorithms import PWM

_KIND = "world_model"


def world_model_meta(alg: Mapping[str, Any], sizes: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """What a checkpoint says about its tensors (JSON): the ``alg`` group and the sizes that ``PWM.from_config`` was given."""
    return {"architecture": _KIND, "alg": dict(alg), "sizes": dict(sizes), **more}


def save_world_model(path: str | os.PathLike[str], agent: PWM, meta: Mapping[str, Any]) -> None:
    """Write the weights of ``agent.model`` and ``meta`` of :func:`world_model_meta`, atomically."""
    checkpoints.save(path, agent.model.state_dict(), meta)


def load_world_model(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> PWM:
    """The agent of a checkpoint made by ``ttcfast train_wm``, with its trained model and a fresh optimizer.

    A checkpoint names the classes of its model and loss. Those of ttcfast are known, your own after
    :func:`ttcfast.pwm.utils.targets.register`; no module is imported because a file names it.

    Raises:
        CheckpointError: missing, damaged, no world model, or of an architecture that this version cannot build, or of an unknown class.
    """
    tensors, meta = checkpoints.load(path, {"architecture": _KIND})
    try:
        agent = PWM.from_config(meta["alg"], **meta["sizes"])
    except (ArgumentError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} describes a world model that this version cannot build ({error})") from error
    agent.model.to(device)
    checkpoints.load_weights(agent.model, tensors, path)
    return agent
