"""Puts small tensors on a device without making the host wait for it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Return a copy on ``device`` of a tensor on the host, or the tensor itself if it is there.

    To a GPU it goes through pinned memory, so that the host runs on; a CUDA graph cannot record that.
    """
    if device.type == "cuda" and not values.is_cuda:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


def constant(values: Sequence[float], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return numbers as a tensor ``[n]`` on ``device``, copied there once; not to be changed."""
    if torch.compiler.is_compiling():
        return torch.tensor(values, dtype=dtype, device=device)
    return _constant(tuple(values), device, dtype)


def indices(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return indices as int64 ``[n]`` on ``device``; as a list they would be copied at every use, which waits for the device."""
    return constant(numbers, device, torch.int64)


def on_device(value: float | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a number or a tensor on ``device`` in ``dtype``."""
    return sent(value, device).to(dtype) if isinstance(value, Tensor) else torch.full((), value, dtype=dtype, device=device)


@lru_cache(maxsize=256)
def _constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):  # tensors of inference mode cannot take part in a later gradient
        return sent(torch.tensor(values, dtype=dtype), device)
