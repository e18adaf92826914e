"""Reads the ``.pt`` files of the plan's sketch: the state dict of a PRM, and training triplets, one per file."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import CheckpointError, DataError, UserError
from ttcfast.runtime.files import require_regular

from .model import PRM

TRIPLET_KEYS = ("state_t", "best", "med", "worst")


def load_state_dict_file(path: str | os.PathLike[str]) -> PRM:
    """Loads ``torch.save(prm.state_dict(), path)``: raw states, zero padding, sizes taken from the tensors; in evaluation mode.

    Raises:
        CheckpointError: The file is missing, holds anything but tensors (nothing else is unpickled), or has other layers than a PRM.
    """
    require_regular(path, "checkpoint", "give a .pt with a PRM's state dict, or a folder of save_pretrained", CheckpointError)
    tensors = _tensors(path, "checkpoint", "a dict of tensors, as prm.state_dict() returns", CheckpointError)
    kernels = [t for name, t in tensors.items() if name.startswith("trunk.") and name.endswith(".weight") and t.ndim == 4]
    if not kernels:
        raise CheckpointError(f"checkpoint {path} has no trunk.*.weight; give the state dict of a PRM, or a folder of save_pretrained")
    width, in_ch = kernels[0].shape[:2]
    try:
        network = PRM(in_ch, width, len(kernels), padding="zeros")
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is not of a PRM over a state and a candidate ({error})") from error
    checkpoints.load_weights(network, {name: t.float() for name, t in tensors.items()}, path)
    return network.eval()


def load_triplet_file(path: Path) -> dict[str, Tensor]:
    """Loads one triplet: the tensors ``TRIPLET_KEYS``, each ``[C, *S]``.

    Raises:
        DataError: The file is damaged, holds anything else, or its states are complex or differ in shape.
    """
    expected = f"a dict of the tensors {', '.join(TRIPLET_KEYS)}"
    held = _tensors(path, "triplet file", expected, DataError)
    if any(key not in held for key in TRIPLET_KEYS):
        raise DataError(f"triplet file {path} holds {', '.join(f'{key}: Tensor' for key in held) or 'nothing'}; expected {expected}")
    for key in TRIPLET_KEYS:
        if held[key].is_complex() or held[key].nbytes > held[key].untyped_storage().nbytes():
            raise DataError(f"triplet file {path} holds {key} {list(held[key].shape)} of {held[key].dtype}, complex or without its values")
    shapes = {tuple(held[key].shape) for key in TRIPLET_KEYS}
    if len(shapes) != 1:
        raise DataError(f"triplet file {path} holds states of shapes {', '.join(map(str, sorted(shapes)))}; expected one shape [C, *S]")
    return held


def _tensors(path: str | os.PathLike[str], what: str, expected: str, error: type[UserError]) -> dict[str, Tensor]:
    """The dict of tensors in a ``.pt`` file."""
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as reason:  # pickle, zip and torch each raise errors of their own
        raise error(
            f"{what} {path} is damaged, or holds something other than tensors, which is not opened ({type(reason).__name__}); "
            f"expected {expected}"
        ) from reason
    if not isinstance(held, dict):
        raise error(f"{what} {path} holds {type(held).__name__}; expected {expected}")
    if foreign := sorted(str(key) for key, value in held.items() if not (isinstance(key, str) and isinstance(value, Tensor))):
        raise error(f"{what} {path} holds {', '.join(foreign)}, which are no tensors; expected {expected}")
    return held
