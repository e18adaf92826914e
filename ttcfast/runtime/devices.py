"""Devices by the name that a user gives."""

from __future__ import annotations

import torch

from .errors import ArgumentError


def device_of(name: str) -> torch.device:
    """The device ``name``; raises ``ArgumentError`` for one that does not exist or is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"device is {name!r}; give cpu, cuda or cuda:<index>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device is {name!r} and torch sees no GPU here; give device=cpu")
    return device
