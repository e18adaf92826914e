"""Detects foreign code that modifies tensors passed to it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .errors import ArgumentError


class ChangedInputError(ArgumentError):
    """Raised if code modified a tensor that it was only to read."""


@contextmanager
def lent(who: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise unless the block leaves ``tensors`` unchanged.

    Every write by torch increases a tensor's version, which costs nothing to compare, on a GPU as well. Writes that torch does not see
    (through ``.numpy()`` or ``.data``, and all in inference mode, where tensors have no version) are detected by a checksum of the bytes:
    on a CPU, at 0.25 ms per MB, and on a GPU in inference mode, which synchronises. Outside inference mode, writes on a GPU through
    ``.data`` or by custom kernels are not detected.

    Args:
        who: Name of the called code in the error (``"scorer my_reward"``).
        tensors: The tensors passed to it, by the names that the error uses.

    Raises:
        ChangedInputError: The block modified a tensor; the message names it and says to work on a clone.
    """
    before = {name: _mark(tensor) for name, tensor in tensors.items()}
    yield
    for name, tensor in tensors.items():
        if _mark(tensor) != before[name]:
            raise ChangedInputError(
                f"{who} changed the {name} that it was given, which a rollout goes on with; leave it as it is, or work on a copy: "
                "x = x.clone() before anything that writes in place (x -= y, x.sub_(y), x[...] = y, x.numpy()[...] = y)"
            )


def _mark(tensor: Tensor) -> tuple[int | None, int | None]:
    """Return version and checksum of a tensor, each None where it does not exist or is not needed."""
    versioned = not tensor.is_inference()
    version = tensor._version if versioned else None
    if (versioned and tensor.device.type != "cpu") or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return version, None
    bytes_ = tensor.detach().contiguous().flatten().view(torch.uint8)
    return version, zlib.crc32(bytes_.numpy()) if tensor.device.type == "cpu" else _checksum(bytes_)  # type: ignore[arg-type]


def _checksum(bytes_: Tensor) -> int:
    """Return a checksum of uint8 ``[n]`` on their device: sums of blocks times their numbers, blind to order within large blocks."""
    block = 1 if len(bytes_) < 2**20 else 4096
    whole = len(bytes_) // block * block
    sums = [bytes_[:whole].view(-1, block).sum(1, dtype=torch.int64), bytes_[whole:].sum(dtype=torch.int64).reshape(1)]
    each = torch.cat(sums)
    return int((each * torch.arange(1, len(each) + 1, device=each.device)).sum())
