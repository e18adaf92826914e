"""Joins the processes of a torchrun and exchanges data between them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import ArgumentError


@contextlib.contextmanager
def process_group(backend: str | None = None) -> Iterator[torch.device]:
    """Join the other processes of ``torchrun`` within a block.

    Does nothing for a single process (no ``WORLD_SIZE``, or 1), or if the group exists.

    Args:
        backend: ``"nccl"`` or ``"gloo"``; None takes NCCL if each process of this machine has a GPU, else gloo.

    Yields:
        The device of this process: its GPU under NCCL, else the CPU.

    Raises:
        ArgumentError: ``WORLD_SIZE`` is set without the other variables of torchrun.
    """
    if (dist.is_available() and dist.is_initialized()) or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ArgumentError(f"WORLD_SIZE is {os.environ['WORLD_SIZE']} and {', '.join(missing)} not set; start the processes by torchrun")
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    backend = backend or ("nccl" if gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", "1")) else "gloo")
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Return the rank of this process; 0 for a single process."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def launched_rank() -> int:
    """Return the rank that torchrun assigned to this process, known before the group exists; 0 for a single process."""
    return int(os.environ.get("RANK", "0")) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else 0


def ranks() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def require_equal(settings: Mapping[str, Any]) -> None:
    """Raise the same ``ValueError`` on all ranks unless all were given the same settings.

    Args:
        settings: Values by name, which are compared by their ``repr``. Every rank must call this.
    """
    if ranks() == 1:
        return
    everyone = gathered({name: repr(value) for name, value in settings.items()})
    names = sorted({name for other in everyone for name in other})
    odd = [name for name in names if len({other.get(name) for other in everyone}) > 1]
    if odd:
        told = "; ".join(f"{name} is {', '.join(str(other.get(name)) for other in everyone)}" for name in odd[:4])
        raise ValueError(f"the ranks 0 to {len(everyone) - 1} have unequal configurations: {told}; give all the same")


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, in rank order: numbers, texts and None, also in lists and dicts, as JSON holds them.

    They travel as tensors, since pickled objects would be read from a GPU twice over.
    """
    if ranks() == 1:
        return [value]
    text = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8).to(_device())
    sizes = torch.cat(beside(torch.tensor([len(text)], device=text.device))).tolist()
    padded = torch.cat([text, text.new_zeros(max(sizes) - len(text))])
    return [json.loads(bytes(other[:size].tolist())) for other, size in zip(beside(padded), sizes)]


def beside(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks, of one shape and dtype, in rank order."""
    if ranks() == 1:
        return [tensor]
    tensor = tensor.contiguous()
    out = [torch.empty_like(tensor) for _ in range(ranks())]
    dist.all_gather(out, tensor)
    return out


def joined(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the tensors of all ranks one after the other; they have ``sizes`` along the first axis and are else of one shape."""
    most = max(sizes)
    padded = torch.cat([tensor, tensor.new_zeros((most - len(tensor), *tensor.shape[1:]))])
    return torch.cat([other[:size] for other, size in zip(beside(padded), sizes)])


def reduced(tensor: Tensor, how: str) -> Tensor:
    """Return the entry-wise ``"sum"``, ``"max"`` or ``"min"`` over the ranks, on all of them."""
    parts = torch.stack(beside(tensor))
    if how == "sum":
        return parts.sum(0)
    return parts.amax(0) if how == "max" else parts.amin(0)


def totals(numbers: Sequence[float], how: str = "sum") -> list[float]:
    """Return numbers reduced over all ranks, each by itself, in one exchange."""
    if ranks() == 1:
        return list(numbers)
    found: list[float] = reduced(torch.tensor(numbers, dtype=torch.float64).to(_device()), how).tolist()
    return found


def total(number: float, how: str = "sum") -> float:
    """Return a number reduced over all ranks."""
    return totals([number], how)[0]


def shared_rows(rows: Tensor, owner: Tensor) -> Tensor:
    """Return each row as its owner has it.

    Their bytes are added to zeros, so that nothing waits for the owners' numbers and no bit changes.

    Args:
        rows: ``[m, ...]``; rows owned by other ranks are ignored.
        owner: int64 ``[m]``, the rank that owns each row, the same on all ranks.
    """
    if ranks() == 1:
        return rows
    bytes_ = rows.contiguous().flatten(1).view(torch.uint8)
    out = torch.where((owner == rank()).unsqueeze(1), bytes_, 0)
    dist.all_reduce(out)
    return out.view(rows.dtype).view(rows.shape)


def _device() -> torch.device:
    """Return where tensors that are exchanged must be."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
