"""Reward models on disk: a folder with ``config.json`` and ``model.safetensors``, or the sketch's ``.pt`` of a state dict."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.core.normalizer import Normalizer
from ttcfast.models.checkpoint import spec_meta
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import CheckpointError
from ttcfast.runtime.files import output_folder, parse_json, require_regular, strict, write_json
from ttcfast.spec import StateSpec

from .dense import DensePRM
from .model import PRM
from .network import PairNetwork

logger = logging.getLogger(__name__)

KINDS: dict[str, type[PairNetwork]] = {"scalar": PRM, "dense": DensePRM}
_NORMALIZER = ("mean", "std", "delta_std")


def save_pretrained(network: PairNetwork, folder: str | os.PathLike[str]) -> None:
    """See ``PairNetwork.save_pretrained``."""
    place = output_folder(folder)
    tensors = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("normalizer.")}
    norm = network.normalizer
    config = {
        "kind": network.kind,
        **network.config(),
        "normalizer": None if norm is None else {name: getattr(norm, name).tolist() for name in _NORMALIZER},
        "spec": None if network.spec is None else strict(spec_meta(network.spec)),
        "info": network.info,
    }
    meta = {"architecture": "prm", "kind": network.kind, **network.config(), "config": strict(config)}
    checkpoints.save(place / "model.safetensors", tensors, meta)
    write_json(place / "config.json", config)


def from_pretrained(folder: str | os.PathLike[str]) -> PairNetwork:
    """See ``PairNetwork.from_pretrained``."""
    place = Path(folder)
    if not (place / "config.json").is_file():
        raise CheckpointError(f"reward model {place} has no config.json; give a folder that save_pretrained or ttcfast train_prm wrote")
    try:
        config = parse_json((place / "config.json").read_text(encoding="utf-8"))
        network = _build(config)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"reward model {place}: config.json describes none that this version can build ({error})") from error
    tensors, meta = checkpoints.load(place / "model.safetensors", {"architecture": "prm", "kind": network.kind, **network.config()})
    _require_own(place, config, meta.get("config"))
    if network.normalizer is not None:
        tensors |= {f"normalizer.{name}": getattr(network.normalizer, name) for name in _NORMALIZER}
    checkpoints.load_weights(network, tensors, place / "model.safetensors")
    return network.eval()


def _require_own(place: Path, config: dict[str, Any], written: dict[str, Any] | None) -> None:
    """Raise ``CheckpointError`` unless ``config.json`` is what was written with the weights, whose file holds it under its checksum."""
    if written is None:
        logger.info("%s was written by an older ttcfast, whose config.json has no checksum: bits that flip in it go unnoticed", place)
    elif other := [name for name in {**config, **written} if config.get(name) != written.get(name)]:
        raise CheckpointError(
            f"reward model {place}: config.json is not the one that model.safetensors was written with (other {', '.join(other)}): it is "
            "damaged, was edited, or a run was killed between the two; copy both again, or run the command that makes them once more"
        )


def load_state_dict_file(path: str | os.PathLike[str]) -> PRM:
    """The sketch's checkpoint, ``torch.save(prm.state_dict(), path)``: raw states, zero padding; sizes are read off the tensors.

    Raises:
        CheckpointError: missing, not a dict of tensors (nothing else is unpickled), or not the sketch's layers.
    """
    tensors = _tensors_of(path)
    kernels = [t for name, t in tensors.items() if name.startswith("trunk.") and name.endswith(".weight") and t.ndim == 4]
    if not kernels:
        raise CheckpointError(f"checkpoint {path} has no trunk.*.weight; give the state dict of a PRM, or a folder of save_pretrained")
    width, in_ch = kernels[0].shape[:2]
    try:
        network = PRM(in_ch, width, len(kernels), padding="zeros")
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is of no PRM over a state and its candidate ({error})") from error
    checkpoints.load_weights(network, {name: t.float() for name, t in tensors.items()}, path)
    return network.eval()


def _tensors_of(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    require_regular(path, "checkpoint", "give a .pt with a PRM's state dict, or a folder of save_pretrained", CheckpointError)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler raises what it likes
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint {path} is damaged or holds more than tensors, which is refused ({reason})") from error
    if not isinstance(found, dict) or not all(isinstance(n, str) and torch.is_tensor(t) for n, t in found.items()):
        raise CheckpointError(f"checkpoint {path} is a {type(found).__name__}, no dict of tensors; save prm.state_dict()")
    return found


def _build(config: dict[str, Any]) -> PairNetwork:
    sizes = dict(config)
    kind, norm, spec, info = sizes.pop("kind"), sizes.pop("normalizer"), sizes.pop("spec"), sizes.pop("info")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; this version knows {', '.join(KINDS)}")
    normalizer = None if norm is None else Normalizer(**{name: torch.tensor(norm[name]) for name in _NORMALIZER})
    return KINDS[kind](**sizes, normalizer=normalizer, spec=None if spec is None else StateSpec(**_tensors_again(spec)), info=info)


def _tensors_again(spec: dict[str, Any]) -> dict[str, Any]:
    return {**spec, **{name: torch.tensor(spec[name]) for name in ("gamma", "cell_volume") if isinstance(spec[name], list)}}
