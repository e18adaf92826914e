"""Saves and loads surrogates: one safetensors file with weights, architecture, normalizer and state layout."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import CheckpointError
from ttcfast.runtime.units import Units
from ttcfast.spec import StateSpec, StochasticConfig

from .fno import FNO, FNOConfig
from .vit import ViT, ViTConfig

ARCHITECTURES: dict[str, tuple[Any, Any]] = {"vit": (ViTConfig, ViT), "fno": (FNOConfig, FNO)}


def surrogate_meta(
    model: ViT | FNO, normalizer: Normalizer, spec: StateSpec, *, time_step: float | None = None, **more: Any
) -> dict[str, Any]:
    """Return a checkpoint's description of its tensors as JSON; ``time_step`` is that of the training data."""
    return {
        "architecture": next(name for name, (_, kind) in ARCHITECTURES.items() if isinstance(model, kind)),
        "model": model.config.to_dict(),
        "predicts": "delta",
        "normalizer": {name: getattr(normalizer, name).tolist() for name in ("mean", "std", "delta_std")},
        "spec": spec.to_meta(),
        "time_step": time_step,
        **more,
    }


def save_surrogate(path: str | os.PathLike[str], model: nn.Module, meta: Mapping[str, Any], *, dtype: torch.dtype | None = None) -> None:
    """Write the weights and ``meta`` of :func:`surrogate_meta`, atomically; ``dtype`` stores them in fewer bits."""
    tensors = {n: (t.to(dtype) if dtype is not None and t.is_floating_point() else t) for n, t in model.state_dict().items()}
    checkpoints.save(path, tensors, meta)


def load_surrogate(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    stochastic: StochasticConfig | Mapping[str, Any] | None = None,
) -> Surrogate:
    """Load the surrogate of a checkpoint written by ``ttcfast train_fm``, in float32 and evaluation mode.

    Raises:
        CheckpointError: It is missing or damaged, its architecture is unknown, or its tensors do not fit.
    """
    return surrogate_of(*checkpoints.load(path), path, device=device, stochastic=stochastic)


def surrogate_of(
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    device: str | torch.device = "cpu",
    stochastic: StochasticConfig | Mapping[str, Any] | None = None,
) -> Surrogate:
    """Return the surrogate that the contents of a checkpoint describe; see :func:`load_surrogate`."""
    model = build_model(meta, path)
    checkpoints.load_weights(model, {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, path)
    with checkpoints.entries_of(path, "a surrogate"):
        normalizer = Normalizer(**{k: torch.tensor(v) for k, v in meta["normalizer"].items()})
        spec = StateSpec.from_meta(meta["spec"])
        predicts = meta["predicts"]
        time_step = None if meta.get("time_step") is None else float(meta["time_step"])  # older checkpoints do not say
        Surrogate(model, spec, normalizer=normalizer, predicts=predicts)  # its checks, before those of stochastic, which is the caller's
    surrogate = Surrogate(model, spec, normalizer=normalizer, predicts=predicts, stochastic=stochastic).to(device)
    surrogate.time_step = time_step
    return surrogate


def units_of(surrogate: Surrogate, path: str | os.PathLike[str]) -> Units:
    """Return the time step and cell volume that a checkpoint was trained for. Gamma is left out, which its network does not read.

    A factory's model with the default cell volume of ``StateSpec``, 1.0, leaves it open.
    """
    volume = surrogate.spec.cell_volume
    unsaid = surrogate.origin is not None and not torch.is_tensor(volume) and volume == 1.0
    return Units(f"the surrogate of {path}", surrogate.time_step, None if unsaid else volume)


def surrogate_hash(surrogate: Surrogate) -> str:
    """Return the SHA-256 (hex) of what determines a surrogate's steps: weights, normalizer, history, prediction target; not the domain."""
    said = {"model": type(surrogate.model).__name__, "predicts": surrogate.predicts, "history": surrogate.history}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    modules = {"model": surrogate.model, "normalizer": surrogate.normalizer}
    for place, module in modules.items():
        for name, tensor in sorted(module.state_dict().items()) if module is not None else ():
            if not isinstance(tensor, Tensor):  # models of others also keep their arguments there
                continue
            value = tensor.detach().cpu().contiguous()
            digest.update(f"{place}.{name.replace('_orig_mod.', '')} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def build_model(meta: Mapping[str, Any], path: str | os.PathLike[str] | Path = "checkpoint") -> nn.Module:
    """Return the untrained model that ``meta`` describes."""
    name = meta.get("architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(f"checkpoint {path} has architecture {name!r}; this version knows {', '.join(ARCHITECTURES)}")
    config, model = ARCHITECTURES[name]
    try:
        return model(config(**meta["model"]))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise CheckpointError(f"checkpoint {path} describes a {name} that this version cannot build ({error})") from error
