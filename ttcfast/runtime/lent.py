"""Tensors lent to somebody else's code: they come back as they were, or one error says who changed them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from .errors import ArgumentError


class ChangedInputError(ArgumentError):
    """Code that was given a tensor to look at has written into it."""


@contextmanager
def lent(who: str, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Raise unless the block leaves ``tensors`` as they are.

    Every write of torch's raises a tensor's version, which costs nothing to compare, on a GPU as well. Writes that torch does not see
    (through ``.numpy()`` or ``.data``, and any in inference mode, where tensors have no version) are found by a checksum of the bytes:
    on a CPU, 0.25 ms per MB, and on a GPU in inference mode, which waits for the device. What is written on a GPU through ``.data`` or by
    a kernel of one's own stays unseen outside of inference mode.

    Args:
        who: whose code the block calls, as the error names it (``"scorer my_reward"``).
        tensors: what it is given, by the name that the error uses.

    Raises:
        ChangedInputError: the block changed one; the message says which, and to work on a clone.
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
    """Version and checksum of a tensor, None where it has none and where the version says all."""
    versioned = not tensor.is_inference()
    version = tensor._version if versioned else None
    if (versioned and tensor.device.type != "cpu") or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return version, None
    bytes_ = tensor.detach().contiguous().flatten().view(torch.uint8)
    return version, zlib.crc32(bytes_.numpy()) if tensor.device.type == "cpu" else _checksum(bytes_)  # type: ignore[arg-type]


def _checksum(bytes_: Tensor) -> int:
    """Of uint8 ``[n]``, where they are: sums of blocks times their numbers. It tells no order within the blocks of large tensors."""
    block = 1 if len(bytes_) < 2**20 else 4096
    whole = len(bytes_) // block * block
    sums = [bytes_[:whole].view(-1, block).sum(1, dtype=torch.int64), bytes_[whole:].sum(dtype=torch.int64).reshape(1)]
    each = torch.cat(sums)
    return int((each * torch.arange(1, len(each) + 1, device=each.device)).sum())
