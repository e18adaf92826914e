"""Means and standard deviations of fields and of their changes between frames, written as The Well's ``stats.yaml``."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from ttcfast.runtime.errors import DataError
from ttcfast.runtime.files import atomic_write
from ttcfast.spec import EulerSpec, StateSpec

from .trajectory_file import TrajectoryFile
from .trajectory_set import TrajectorySet
from .well_fields import tensor_fields


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation per channel, ``[C]`` float64, of the states and of the differences between consecutive frames."""

    mean: Tensor
    std: Tensor
    delta_mean: Tensor
    delta_std: Tensor

    def require_variation(self, spec: StateSpec, where: str) -> None:
        """Require every channel that is not given to vary in space and in time, so that it can be normalised.

        Args:
            spec: Layout that names the channels.
            where: Description of the data for the message.

        Raises:
            DataError: A channel is constant, or changes by the same amount in every frame and cell.
        """
        for what, mean, std in (("is constant", self.mean, self.std), ("does not change in time", self.delta_mean, self.delta_std)):
            # The sums are float64 and the data float32: a deviation below 1e-7 of the size is rounding.
            still = (std <= 1e-7 * (mean**2 + std**2).sqrt()).nonzero().flatten().tolist()
            still = [c for c in still if c not in spec.given_channels]
            if still:
                names = ", ".join(f"channel {c} ({spec.names[c]})" for c in still)
                raise DataError(
                    f"{names} of {where} {what} (deviation {float(std[still[0]]):.3g}), so that it cannot be normalised; give trajectories "
                    "in which it varies (other presets, more of them, a longer time), or files without that channel"
                )


def field_statistics(data: TrajectorySet | Sequence[str | os.PathLike[str]]) -> Statistics:
    """Compute population statistics over all trajectories, frames and cells, with one trajectory in memory at a time.

    Args:
        data: Trajectories, or paths of files in The Well's layout.
    """
    chosen = data if isinstance(data, TrajectorySet) else TrajectorySet([TrajectoryFile(path) for path in data])
    parts = []
    for i in range(len(chosen)):
        states = chosen[i].double().transpose(0, 1).flatten(2)  # [C, T, cells]
        parts.append((moments(states), moments(states.diff(dim=1))))
    chosen.close()
    (mean, std), (delta_mean, delta_std) = (mean_std(each) for each in zip(*parts, strict=True))
    return Statistics(mean, std, delta_mean, delta_std)


def write_statistics(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> Statistics:
    """Compute the statistics of ``paths`` and write mean, std, rms and their ``_delta`` forms per field to ``out``.

    A scalar field has one number, a vector or tensor a list with one per component, as The Well's loader reads them.
    """
    data = TrajectorySet([TrajectoryFile(path) for path in paths])
    found = field_statistics(data)
    entries: dict[str, dict[str, Any]] = {}
    for prefix, mean, std in (("", found.mean, found.std), ("_delta", found.delta_mean, found.delta_std)):
        rms = (mean**2 + std**2).sqrt()
        for name, values in (("mean", mean), ("std", std), ("rms", rms)):
            entries[name + prefix] = _by_field(values, data.spec)
    with atomic_write(out) as file:
        yaml.safe_dump(entries, file, sort_keys=True)
    return found


def _by_field(values: Tensor, spec: StateSpec) -> dict[str, Any]:
    """Return values ``[C]`` per channel by field."""
    if isinstance(spec, EulerSpec):
        density, *momentum, energy = values.tolist()
        return {"density": density, "momentum": momentum, "energy": energy}
    found: dict[str, Any] = {}
    for name, channels in tensor_fields(spec.names, spec.ndim).items():
        held = values[[spec.names.index(channel) for channel in channels]]
        rank = 0 if channels == (name,) else channels[0].removeprefix(f"{name}_").count("x")
        found[name] = held.reshape([spec.ndim] * rank).tolist()
    return found


def moments(x: Tensor) -> Tensor:
    """Return count, sum and sum of squares of each row of ``[C, ...]``, ``[3, C]``."""
    flat = x.flatten(1)
    return torch.stack([torch.full_like(flat[:, 0], flat.shape[1]), flat.sum(1), (flat * flat).sum(1)])


def mean_std(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation per row, ``[C]`` each, from the ``moments`` of one or more parts."""
    count, total, square = functools.reduce(torch.add, parts)
    mean = total / count
    return mean, (square / count - mean**2).clamp(min=0).sqrt()
