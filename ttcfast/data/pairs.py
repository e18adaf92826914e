"""Short windows of trajectories for training, picked by (seed, step) so that a resumed run sees what an unbroken one would."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ttcfast.spec import at_least

from .trajectory_file import TrajectoryFile, require_alike


class WindowSampler:
    """Random windows of ``length`` neighbouring frames from many trajectory files, read lazily.

    Args:
        paths: files on one grid.
        length: frames a window, 2 for (x_t, x_t+1).
        seed: of the order.

    Raises:
        ValueError: no file, or windows longer than the trajectories. DataError: a file that cannot be read.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]], *, length: int = 2, seed: int = 0) -> None:
        self.files = [TrajectoryFile(p) for p in paths]
        at_least("number of files", len(self.files), 1)
        require_alike(self.files)
        self.length, self.seed = length, seed
        self._starts = len(self.files[0].times) - length + 1
        if self._starts < 1:
            raise ValueError(f"length is {length}; the trajectories have {len(self.files[0].times)} frames")
        self._index = [(f, i) for f in range(len(self.files)) for i in range(len(self.files[f]))]

    def __len__(self) -> int:
        """Windows in all."""
        return len(self._index) * self._starts

    def batch(self, step: int, size: int) -> Tensor:
        """Windows ``[size, length, C, *S]`` of training step ``step``; epochs are random permutations of all windows."""
        first = step * size
        windows = []
        for position in range(first, first + size):
            epoch, place = divmod(position, len(self))
            trajectory, start = divmod(int(self._order(epoch)[place]), self._starts)
            file, i = self._index[trajectory]
            windows.append(self.files[file].read(i, start, start + self.length))
        return torch.stack(windows)

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self._permutation
