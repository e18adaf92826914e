"""The inputs that every operation is tried on, listed once: sizes, memory layouts and hard values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SMALL_SIZES = (1, 2, 3, 15, 16, 17, 31, 33, 127, 129)  # 1, odd, 2^n and its neighbours
TILE_EDGES = (1023, 1024, 1025, 4095, 4096, 4097)  # around the tiles of the Triton and the C++ implementations
LARGE_SIZE = 1_000_003


def _sliced(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 2:-3] = x
    return wide[..., 2:-3]


def _strided(x: Tensor) -> Tensor:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


# Views that hold the same numbers in another order in memory; what lies between them is NaN.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "sliced": _sliced,
    "strided": _strided,
    "axis moved": _channels_last,
    "batch strided": lambda x: torch.stack([x, torch.full_like(x, float("nan"))], 1)[:, 0],
}


def _scattered(shape: tuple[int, ...], dtype: torch.dtype, value: float) -> Tensor:
    x = 1 + torch.rand(shape, dtype=torch.float64).to(dtype)
    x.flatten()[:: max(1, x.numel() // 3)] = value
    return x


# Values by name, each a function of (shape, dtype). Those with NaN or infinities say so in their name.
VALUES: dict[str, Callable[[tuple[int, ...], torch.dtype], Tensor]] = {
    "uniform": lambda shape, dtype: 1 + torch.rand(shape, dtype=torch.float64).to(dtype),
    "normal": lambda shape, dtype: torch.randn(shape, dtype=torch.float64).to(dtype),
    "constant": lambda shape, dtype: torch.full(shape, 1.5, dtype=dtype),
    "ties": lambda shape, dtype: torch.randint(1, 4, shape).to(dtype),
    "zeros of both signs": lambda shape, dtype: torch.where(torch.rand(shape) < 0.5, 0.0, -0.0).to(dtype),
    "subnormal": lambda shape, dtype: torch.finfo(dtype).tiny * torch.rand(shape).to(dtype),
    "ascending": lambda shape, dtype: torch.linspace(0.1, 2, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape).to(dtype),
    "descending": lambda shape, dtype: torch.linspace(2, 0.1, torch.Size(shape).numel(), dtype=torch.float64).reshape(shape).to(dtype),
    "shared leading bits": lambda shape, dtype: (1 + torch.finfo(dtype).eps * torch.randint(0, 4, shape)).to(dtype),
    "large": lambda shape, dtype: 1e9 * (1 + torch.rand(shape, dtype=torch.float64)).to(dtype),
    "inf": lambda shape, dtype: _scattered(shape, dtype, float("inf")),
    "-inf": lambda shape, dtype: _scattered(shape, dtype, float("-inf")),
    "nan": lambda shape, dtype: _scattered(shape, dtype, float("nan")),
}

NON_FINITE = ("inf", "-inf", "nan")
EMPTY_BATCH = 0
