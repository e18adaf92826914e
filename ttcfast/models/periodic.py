"""Convolutions on grids with periodic axes, or axes that end at a wall or an open side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

LARGE = 2**17  # numbers from which one pass over memory is faster than two with fewer calls


class GridConv2d(nn.Conv2d):
    """Convolution that keeps the grid's size: it wraps around periodic axes and repeats the edge on the others.

    Args:
        periodic: One flag per axis, (x, y). Other arguments as for ``nn.Conv2d``; the kernel must exceed the stride by an even number.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, periodic: Sequence[bool], stride: int = 1, groups: int = 1
    ):
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, groups=groups)
        self.periodic = tuple(periodic)
        self.margin = (kernel_size - stride) // 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(pad_grid(x, self.margin, self.periodic))


def pad_grid(x: Tensor, margin: int, periodic: Sequence[bool]) -> Tensor:
    """Pad ``[N, C, X, Y]`` with ghost cells: wrapped around periodic axes, edge values elsewhere."""
    if margin == 0:
        return x
    if x.numel() > LARGE and min(x.shape[2:]) >= margin and not _recorded():
        return _filled(x, margin, periodic)
    for axis, wraps in zip((2, 3), periodic, strict=True):
        n = x.shape[axis]
        if wraps:
            low, high = x.narrow(axis, n - margin, margin), x.narrow(axis, 0, margin)
        else:
            shape = [-1, -1, -1, -1]
            shape[axis] = margin
            low, high = x.narrow(axis, 0, 1).expand(shape), x.narrow(axis, n - 1, 1).expand(shape)
        # cat keeps channels_last, which nn.functional.pad does not; the copies cost more than the convolution.
        x = torch.cat([low, x, high], axis)
    return x


def _recorded() -> bool:
    """Whether the operations are recorded or transformed."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._functorch.maybe_current_level() is not None


def _filled(x: Tensor, margin: int, periodic: Sequence[bool]) -> Tensor:
    """Pad by writing into new memory once, where ``cat`` copies everything once per axis. Inductor and gradients prefer ``cat``."""
    (n, c, *cells), last = x.shape, x.is_contiguous(memory_format=torch.channels_last)
    grid = [cell + 2 * margin for cell in cells]
    out = x.new_empty((n, *grid, c)).permute(0, 3, 1, 2) if last else x.new_empty((n, c, *grid))
    rows = out.narrow(2, margin, cells[0])
    rows.narrow(3, margin, cells[1]).copy_(x)
    for axis, part in ((3, rows), (2, out)):  # the corners last
        size, wraps = cells[axis - 2], periodic[axis - 2]
        low, high = (size, margin) if wraps else (margin, size + margin - 1)  # where the ghost cells' values begin
        width = margin if wraps else 1
        part.narrow(axis, 0, margin).copy_(part.narrow(axis, low, width))
        part.narrow(axis, size + margin, margin).copy_(part.narrow(axis, high, width))
    return out
