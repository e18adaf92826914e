"""Devices by the name that a user gives."""

from __future__ import annotations

import torch

from .errors import ArgumentError


def device_of(name: str) -> torch.device:
    """Return the device ``name``; raise ``ArgumentError`` if it does not exist or cannot be used."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"device is {name!r}; give cpu, cuda or cuda:<index>") from error
    if device.type == "meta":
        raise ArgumentError(f"device is {name!r}, which holds no numbers; give cpu, cuda or cuda:<index>")
    if device.type == "cpu" and device.index:
        raise ArgumentError(f"device is {name!r} and there is one CPU device; give device=cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError(f"device is {name!r} and torch sees no GPU here; give device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device is {name!r} and torch sees {torch.cuda.device_count()} GPUs here, counted from 0; give one of them")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ArgumentError(f"device is {name!r}, which cannot be used here ({str(error).splitlines()[0]}); give cpu or cuda") from error
    return device
