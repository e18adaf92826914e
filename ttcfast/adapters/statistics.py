"""Converts the normalisers of neuraloperator and The Well."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ttcfast.checks import one_of
from ttcfast.core.normalizer import Normalizer

from .wrappers import no_gradient


class _InAndOut(Normalizer):
    """A normaliser with other statistics for what the model returns."""

    out_mean: Tensor
    out_std: Tensor

    def __init__(self, mean: Tensor, std: Tensor, out_mean: Tensor, out_std: Tensor) -> None:
        super().__init__(mean, std)
        checked = Normalizer(out_mean, out_std)
        self.register_buffer("out_mean", checked.mean)
        self.register_buffer("out_std", checked.std)

    def decode(self, z: Tensor, *, channel_axis: int = 1) -> Tensor:
        return torch.addcmul(self._at(self.out_mean, z, channel_axis), z, self._at(self.out_std, z, channel_axis))


def normalizer(source: Any, *, predicts: Literal["state", "delta"] = "state", channels: int | None = None) -> Normalizer:
    """Converts the normaliser of another package, or passes on one of ours.

    Args:
        source: neuraloperator's ``UnitGaussianNormalizer``, or a data processor with ``in_normalizer`` and ``out_normalizer``; The Well's
            ``ZScoreNormalization`` or ``RMSNormalization``, whose constant fields follow the variable ones.
        predicts: What a data processor's ``out_normalizer`` is of: the next state, or the change over one step.
        channels: Number of channels over which statistics without channels are repeated.

    Raises:
        TypeError: The object is of no known kind.
        ValueError: The statistics are missing, or cannot be repeated.
    """
    one_of("predicts", predicts, ("state", "delta"))
    if isinstance(source, Normalizer):
        return source
    if hasattr(source, "flattened_means") or hasattr(source, "flattened_rmss"):
        return _of_the_well(source)
    if hasattr(source, "in_normalizer") and hasattr(source, "out_normalizer"):
        return _of_processor(source, predicts, channels)
    if hasattr(source, "mean") and hasattr(source, "std"):
        return Normalizer(*_gaussian(source, channels))
    raise TypeError(
        f"source is a {type(source).__name__}; give a UnitGaussianNormalizer or data processor of neuraloperator, a ZScoreNormalization or "
        "RMSNormalization of The Well, or a ttcfast Normalizer(mean, std)"
    )


def _of_processor(source: Any, predicts: str, channels: int | None) -> Normalizer:
    given = {name: getattr(source, name) for name in ("in_normalizer", "out_normalizer")}
    found = {name: None if one is None else _gaussian(one, channels) for name, one in given.items()}
    known = next((pair for pair in found.values() if pair is not None), None)
    if known is None:
        raise ValueError(f"{type(source).__name__} has neither in_normalizer nor out_normalizer; leave the surrogate's normalizer out")
    none = torch.zeros_like(known[0]), torch.ones_like(known[1])
    (mean, std), (out_mean, out_std) = (found[name] or none for name in ("in_normalizer", "out_normalizer"))
    if predicts == "delta":
        return Normalizer(mean, std, out_std, out_mean)
    same = mean.shape == out_mean.shape and torch.equal(mean, out_mean) and torch.equal(std, out_std)
    return Normalizer(mean, std) if same else _InAndOut(mean, std, out_mean, out_std)


def _gaussian(source: Any, channels: int | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, ``[C]`` or ``[C, *S]``, of statistics that broadcast over ``[M, C, *S]``."""
    if source.mean is None or source.std is None:
        raise ValueError(f"{type(source).__name__} has no statistics; call its fit first")
    mean, std = no_gradient(source.mean, source.std)
    return _by_channel("mean", mean, channels), _by_channel("std", std + getattr(source, "eps", 0.0), channels)


def _by_channel(name: str, value: Tensor, channels: int | None) -> Tensor:
    if value.ndim > 1:
        if value.shape[0] != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; its first axis is that of the batch and must have size 1")
        value = value[0]
        if value.shape[1:].numel() == 1:
            value = value.flatten()
    if channels is not None and (value.ndim == 0 or value.shape[0] == 1):
        value = value.reshape(1, *value.shape[1:]).expand(channels, *value.shape[1:])
    if value.ndim == 0:
        raise ValueError(f"{name} is one number for all channels; say how many there are by channels=")
    if channels is not None and value.shape[0] != channels:
        raise ValueError(f"{name} has {value.shape[0]} channels and channels is {channels}; leave channels out")
    if value.ndim > 1 and 1 in value.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; give one value per channel, or one per cell")
    return value.clone()


def _of_the_well(source: Any) -> Normalizer:
    def all_fields(name: str) -> Tensor:
        parts = getattr(source, f"flattened_{name}")
        constant = [parts["constant"]] if source.core_constant_field_names else []
        return torch.cat(no_gradient(*([parts["variable"]] if source.core_field_names else []), *constant))

    if hasattr(source, "flattened_rmss"):
        rms = all_fields("rmss")
        return Normalizer(torch.zeros_like(rms), rms, all_fields("rmss_delta"))
    return Normalizer(all_fields("means"), all_fields("stds"), all_fields("stds_delta"), all_fields("means_delta"))
