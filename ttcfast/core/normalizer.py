"""Converts between physical units and the units a model was trained in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalizer(nn.Module):
    """Affine normalisation ``(x - mean) / std`` per channel or per cell, with a scale for the change over one step.

    The statistics are buffers: they move with ``.to(device)`` and are saved with the module.

    Args:
        mean: Mean of each channel, ``[C]``, or of each cell, ``[C, *S]``, physical units.
        std: Standard deviation of each channel or cell, positive.
        delta_std: Standard deviation of the change over one step, positive; None means ``std``.
        delta_mean: Mean of the change over one step; None means 0.

    Raises:
        ValueError: Numbers of channels or cells differ, or a standard deviation is not positive and finite.
    """

    mean: Tensor
    std: Tensor
    delta_std: Tensor
    delta_mean: Tensor | None

    def __init__(self, mean: Tensor, std: Tensor, delta_std: Tensor | None = None, delta_mean: Tensor | None = None) -> None:
        super().__init__()
        values = {"mean": mean, "std": std, "delta_std": std if delta_std is None else delta_std}
        if delta_mean is None:
            self.register_buffer("delta_mean", None)  # absent from the state dict, as in checkpoints without it
        else:
            values["delta_mean"] = delta_mean
        first = torch.as_tensor(mean)
        for name, value in values.items():
            v = torch.as_tensor(value).detach().clone()
            v = v if v.is_floating_point() else v.float()
            cells = [t.shape[1:] for t in (v, first) if t.ndim > 1]
            if v.ndim == 0 or first.ndim == 0 or v.shape[0] != first.shape[0] or len(set(cells)) > 1:
                raise ValueError(
                    f"{name} has shape {tuple(v.shape)} and mean {tuple(first.shape)}; give one value per channel [C], or per cell [C, *S]"
                )
            if not bool(v.isfinite().all()) or (not name.endswith("mean") and not bool((v > 0).all())):
                shown = v.tolist() if v.ndim == 1 else f"between {float(v.min())} and {float(v.max())}"
                raise ValueError(f"{name} is {shown}; give finite values" + ("" if name.endswith("mean") else " above 0"))
            self.register_buffer(name, v)

    @property
    def num_channels(self) -> int:
        return int(self.mean.shape[0])

    def encode(self, x: Tensor, *, channel_axis: int = 1) -> Tensor:
        """Converts physical ``[N, C, *S]`` to normalised units; channels are on ``channel_axis``."""
        return (x - self._at(self.mean, x, channel_axis)) / self._at(self.std, x, channel_axis)

    def decode(self, z: Tensor, *, channel_axis: int = 1) -> Tensor:
        """Converts normalised ``[N, C, *S]`` to physical units."""
        return torch.addcmul(self._at(self.mean, z, channel_axis), z, self._at(self.std, z, channel_axis))

    def encode_delta(self, delta: Tensor, *, channel_axis: int = 1) -> Tensor:
        """Converts a physical change ``[N, C, *S]`` to the units that a delta model predicts."""
        if self.delta_mean is not None:
            delta = delta - self._at(self.delta_mean, delta, channel_axis)
        return delta / self._at(self.delta_std, delta, channel_axis)

    def decode_delta(self, z: Tensor, *, channel_axis: int = 1) -> Tensor:
        """Converts a predicted change ``[N, C, *S]`` to physical units."""
        change = z * self._at(self.delta_std, z, channel_axis)
        return change if self.delta_mean is None else change + self._at(self.delta_mean, z, channel_axis)

    def unit_of_delta(self, x: Tensor, *, channel_axis: int = 1) -> Tensor:
        """Returns ``delta_std`` shaped to scale ``x``, for differences of two states, of which no mean change is taken off."""
        return self._at(self.delta_std, x, channel_axis)

    def _at(self, value: Tensor, x: Tensor, channel_axis: int) -> Tensor:
        axis = channel_axis % x.ndim
        channels = value.shape[0]
        if x.shape[axis] != channels:
            raise ValueError(f"x has {x.shape[axis]} channels on axis {axis} (shape {tuple(x.shape)}); the normalizer has {channels}")
        if value.ndim > 1:
            if value.shape[1:] != x.shape[axis + 1 :]:
                raise ValueError(
                    f"x has cells {tuple(x.shape[axis + 1 :])} and the normalizer statistics for each of {tuple(value.shape[1:])}; "
                    "give states on that grid, or one value per channel"
                )
            return value.to(x.dtype)
        return value.to(x.dtype).reshape(-1, *[1] * (x.ndim - axis - 1))
