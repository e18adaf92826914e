"""Converts between physical units and the units a model was trained in."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalizer(nn.Module):
    """Per-channel affine normalisation ``(x - mean) / std``, with a scale for the change over one step.

    The statistics are buffers: they move with ``.to(device)`` and are saved with the module.

    Args:
        mean: Mean of each channel, ``[C]``, physical units.
        std: Standard deviation of each channel, ``[C]``, positive.
        delta_std: Standard deviation of the change over one step, ``[C]``, positive; None means ``std``.

    Raises:
        ValueError: Shapes differ, or a standard deviation is not positive and finite.
    """

    mean: Tensor
    std: Tensor
    delta_std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, delta_std: Tensor | None = None) -> None:
        super().__init__()
        values = {"mean": mean, "std": std, "delta_std": std if delta_std is None else delta_std}
        for name, value in values.items():
            v = torch.as_tensor(value).detach().clone()
            v = v if v.is_floating_point() else v.float()
            if v.ndim != 1 or v.shape != torch.as_tensor(mean).shape:
                raise ValueError(
                    f"{name} has shape {tuple(v.shape)} and mean {tuple(torch.as_tensor(mean).shape)}; give one value per channel [C]"
                )
            if not bool(v.isfinite().all()) or (name != "mean" and not bool((v > 0).all())):
                raise ValueError(f"{name} is {v.tolist()}; give finite values" + ("" if name == "mean" else " above 0"))
            self.register_buffer(name, v)

    @property
    def num_channels(self) -> int:
        return self.mean.numel()

    def encode(self, x: Tensor, *, channel_axis: int = 1) -> Tensor:
        """Converts physical ``[N, C, *S]`` to normalised units; channels are on ``channel_axis``."""
        return (x - self._at(self.mean, x, channel_axis)) / self._at(self.std, x, channel_axis)

    def decode(self, z: Tensor, *, channel_axis: int = 1) -> Tensor:
        """Converts normalised ``[N, C, *S]`` to physical units."""
        return torch.addcmul(self._at(self.mean, z, channel_axis), z, self._at(self.std, z, channel_axis))

    def encode_delta(self, delta: Tensor, *, channel_axis: int = 1) -> Tensor:
        """Converts a physical change ``[N, C, *S]`` to the units that a delta model predicts."""
        return delta / self._at(self.delta_std, delta, channel_axis)

    def decode_delta(self, z: Tensor, *, channel_axis: int = 1) -> Tensor:
        """Converts a predicted change ``[N, C, *S]`` to physical units."""
        return z * self._at(self.delta_std, z, channel_axis)

    def _at(self, value: Tensor, x: Tensor, channel_axis: int) -> Tensor:
        axis = channel_axis % x.ndim
        if x.shape[axis] != value.numel():
            raise ValueError(f"x has {x.shape[axis]} channels on axis {axis} (shape {tuple(x.shape)}); the normalizer has {value.numel()}")
        return value.to(x.dtype).reshape(-1, *[1] * (x.ndim - axis - 1))
