"""Random windows of trajectories for training, drawn by (seed, step) so that a resumed run sees the same windows."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ttcfast.runtime.errors import DataError

from .alike import require_alike
from .trajectory_file import TrajectoryFile
from .trajectory_set import TrajectorySet

# A shuffled epoch is held in memory, 8 bytes a window.
_MOST = 2**26


class WindowSampler:
    """Draws random windows of ``length`` consecutive frames from many trajectories, read lazily.

    Args:
        data: Trajectories with one common gamma, or paths of files in The Well's layout.
        length: Frames per window; 2 gives (x_t, x_t+1).
        seed: Random seed of the order.

    Raises:
        ValueError: ``length`` exceeds the trajectories.
        DataError: A file is missing or unreadable, files differ, or there are more windows than can be shuffled in memory.
    """

    def __init__(self, data: TrajectorySet | Sequence[str | os.PathLike[str]], *, length: int = 2, seed: int = 0) -> None:
        self.data = data if isinstance(data, TrajectorySet) else TrajectorySet([TrajectoryFile(p) for p in data])
        require_alike(self.data.files)
        self.length, self.seed = length, seed
        self._starts = len(self.data.times) - length + 1
        if self._starts < 1:
            raise ValueError(f"length is {length}; the trajectories have {len(self.data.times)} frames")
        if len(self) > _MOST:
            raise DataError(f"the data files declare {len(self)} windows; at most {_MOST} can be shuffled: give fewer files or a split")

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.data) * self._starts

    def batch(self, step: int, size: int) -> Tensor:
        """Return the windows ``[size, length, C, *S]`` of training step ``step``; each epoch is a random permutation of all windows."""
        first = step * size
        windows = []
        for position in range(first, first + size):
            epoch, place = divmod(position, len(self))
            trajectory, start = divmod(int(self._order(epoch)[place]), self._starts)
            windows.append(self.data.read(trajectory, start, start + self.length))
        return torch.stack(windows)

    def _order(self, epoch: int) -> np.ndarray:
        if getattr(self, "_epoch", None) != epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self))
        return self._permutation
