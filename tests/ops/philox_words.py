"""Philox's integers of every backend, for the tests of the keyed operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttcfast.ops import keyed, native

Counters = tuple[int, int, int, int]


def philox_words(backend: str, device: str, counters: Sequence[Counters], key: tuple[int, int]) -> list[list[int]]:
    """The four words of each counter."""
    if backend == "cpu":
        return [_native(*counter, key, native.threads_and_level()[1]) for counter in counters]
    columns = torch.tensor(counters, dtype=torch.int64, device=device).T.contiguous()  # [4, n]
    if backend == "triton":
        return _triton(columns, key).T.tolist()
    words = keyed.philox((columns[0], columns[1], columns[2], columns[3]), (_one(key[0], device), _one(key[1], device)))
    return torch.stack(words, 1).tolist()


def interpreted(backend: str, device: str) -> bool:
    """Whether kernels take a hundredth of a second per program: logic is checked on a few small shapes then."""
    return backend == "triton" and device == "cpu"


def _native(c0: int, c1: int, c2: int, c3: int, key: tuple[int, int], level: int) -> list[int]:
    return list(native.module().keyed_words(key[0] | key[1] << 32, c3, c1 | c2 << 32, 4 * c0, 4, level))


def _triton(columns: Tensor, key: tuple[int, int]) -> Tensor:
    from tests.ops.philox_kernel import words_kernel

    out = torch.empty_like(columns)
    words_kernel[(1,)](out, columns, columns.shape[1], torch.tensor(key, device=columns.device), columns.device.type == "cpu", TILE=16)
    return out


def _one(value: int, device: str) -> Tensor:
    return torch.tensor([value], device=device)
