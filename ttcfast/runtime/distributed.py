"""Joins the processes of a torchrun and exchanges data between them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
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
        settings: Values by name, which must be picklable and comparable. Every rank must call this.
    """
    if ranks() == 1:
        return
    mine = {name: repr(value) for name, value in settings.items()}
    everyone = gathered(mine)
    names = sorted({name for other in everyone for name in other})
    odd = [name for name in names if len({other.get(name) for other in everyone}) > 1]
    if odd:
        told = "; ".join(f"{name} is {', '.join(str(other.get(name)) for other in everyone)}" for name in odd[:4])
        raise ValueError(f"the ranks 0 to {len(everyone) - 1} have unequal configurations: {told}; give all the same")


def gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, any picklable ones, in rank order."""
    out: list[Any] = [None] * ranks()
    if len(out) == 1:
        return [value]
    dist.all_gather_object(out, value)
    return out


def beside(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks, of one shape and dtype, in rank order."""
    if ranks() == 1:
        return [tensor]
    tensor = tensor.contiguous()
    out = [torch.empty_like(tensor) for _ in range(ranks())]
    dist.all_gather(out, tensor)
    return out


def reduced(tensor: Tensor, how: str) -> Tensor:
    """Return the entry-wise ``"sum"``, ``"max"`` or ``"min"`` over the ranks, on all of them."""
    parts = torch.stack(beside(tensor))
    if how == "sum":
        return parts.sum(0)
    return parts.amax(0) if how == "max" else parts.amin(0)


def total(number: float, how: str = "sum") -> float:
    """Return a number reduced over all ranks."""
    numbers: list[float] = gathered(number)
    if how == "sum":
        return sum(numbers)
    return max(numbers) if how == "max" else min(numbers)


def shared_rows(rows: Tensor, owner: Tensor) -> Tensor:
    """Return each row as its owner has it, by one broadcast from every rank that owns any.

    Args:
        rows: ``[m, ...]``; rows owned by other ranks are ignored.
        owner: int64 ``[m]``, the rank that owns each row, the same on all ranks.
    """
    if ranks() == 1:
        return rows
    out = rows.clone()
    for source in owner.unique().tolist():
        own = (owner == source).nonzero().flatten()
        part = rows[own].contiguous()
        dist.broadcast(part, src=source)
        out[own] = part
    return out
