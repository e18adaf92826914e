"""World models on disk: one safetensors file with the weights and the configuration to rebuild the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError, CheckpointError

from .algorithms import PWM

_KIND = "world_model"


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
