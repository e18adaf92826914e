"""Detects tensors that share memory, which an operation must know before it writes in place."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor


def within_itself(tensor: Tensor, address: int) -> bool:
    """Tell whether two indices address one element, as in an expanded tensor; ``address`` is that of the first element."""
    reach = 0  # elements from the first to the last, over the axes so far
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return False  # every axis steps past everything that the previous ones reach: sliced, strided, permuted
    part = _Elements.of(tensor, address)
    while part.ndim and part.size:  # only the difference of two indices matters: one of them is 0 where they first differ
        if np.shares_memory(part[:1], part[1:]):
            return True
        part = part[0]
    return False


def shared_pair(tensors: Sequence[Tensor], addresses: Sequence[int]) -> tuple[int, int] | None:
    """Return the first two tensors that share an element, or None. Does not read their memory.

    Args:
        tensors: Tensors with any strides on one device.
        addresses: Addresses of their first elements.
    """
    packed = all(map(Tensor.is_contiguous, tensors))
    extents = tuple(map(_bytes if packed else _extent, tensors))
    if _apart(tuple(addresses), extents):
        return None
    seen: dict[int, int] = {}
    for i, address in enumerate(addresses):  # the common mistake, found at once
        if extents[i] and seen.setdefault(address, i) != i:
            return seen[address], i
    for i, j in _overlapping(addresses, extents):
        if np.shares_memory(_Elements.of(tensors[i], addresses[i]), _Elements.of(tensors[j], addresses[j])):
            return i, j
    return None


@lru_cache(maxsize=32)  # a training loop checks the same memory at every step
def _apart(addresses: tuple[int, ...], extents: tuple[int, ...]) -> bool:
    """Tell whether the memory ranges are disjoint; may return False for an empty range inside another."""
    return all(start + extent <= later for (start, extent), (later, _) in pairwise(sorted(zip(addresses, extents))))


def _overlapping(addresses: Sequence[int], extents: Sequence[int]) -> list[tuple[int, int]]:
    """Yield pairs of ranges that share a byte, smaller index first, in order."""
    order = sorted((i for i, extent in enumerate(extents) if extent), key=addresses.__getitem__)
    found: list[tuple[int, int]] = []
    open_: list[int] = []
    for j in order:
        open_ = [i for i in open_ if addresses[i] + extents[i] > addresses[j]]
        found += [(min(i, j), max(i, j)) for i in open_]
        open_.append(j)
    return sorted(found)


_bytes = operator.attrgetter("nbytes")


def _extent(tensor: Tensor) -> int:
    """Return the bytes from the first to the last element."""
    if tensor.numel() == 0:
        return 0
    return (1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))) * tensor.itemsize


class _Elements:
    """Describe a tensor's memory to numpy, which only calculates with the address, so any device works."""

    def __init__(self, tensor: Tensor, address: int) -> None:
        self.__array_interface__ = {
            "data": (address, True),
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * tensor.itemsize for stride in tensor.stride()),
            "typestr": f"|V{tensor.itemsize}",
            "version": 3,
        }

    @classmethod
    def of(cls, tensor: Tensor, address: int) -> np.ndarray[Any, Any]:
        return np.asarray(cls(tensor, address))
