"""Errors of a rollout against the truth, per time step, under the names used in the field. All sums are float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import matched

_EPS = 1e-7  # The Well's, added to a mean square or variance in physical units


def rollout_mse(pred: Tensor, truth: Tensor, *, scale: float | Tensor | None = None, per_channel: bool = False, ndim: int = 2) -> Tensor:
    """Returns the mean squared error of every frame, ``mean(((pred - truth) / scale)^2)`` over channels and cells.

    Args:
        pred: Trajectory ``[N, T+1, C, *S]`` or ``[C, T+1, *S]`` in physical units; frames beyond the truth's last are ignored.
        truth: Trajectory of the same layout, at most as long.
        scale: A number or one per channel ``[C]``, in the channels' units, such as standard deviations; None means 1.
        per_channel: Whether to keep channels separate.
        ndim: Number of space axes, which distinguishes the two layouts.

    Returns:
        float64 ``[N, T+1]`` (``[T+1]`` for one trajectory), with a last axis ``[C]`` if ``per_channel``; NaN where ``pred`` has NaN.

    Raises:
        ValueError: Shapes differ, the truth is longer than the prediction, or the scale has another length or is not positive.

    Source: TTC plan, "Metrics & Evaluation".
    """

    def frame(p: Tensor, t: Tensor) -> Tensor:
        error = p - t
        if scale is not None:
            error = error / _channelwise("scale", scale, t, positive=True)
        return _mean_channels(error.square().flatten(2).mean(2), per_channel)

    return _over_frames(pred, truth, ndim, frame)


def nrmse(pred: Tensor, truth: Tensor, *, per_channel: bool = False, ndim: int = 2) -> Tensor:
    """Returns the normalised root mean squared error of each field, ``sqrt(mean(err^2) / (mean(truth^2) + 1e-7))`` over cells.

    Arguments, shapes and errors are those of ``rollout_mse``; without ``per_channel``, the mean over fields.

    Source: Ohana et al., The Well, 2024; its NRMSE with norm_mode "norm".
    """
    return _over_frames(pred, truth, ndim, lambda p, t: _root(p, t, t.square().flatten(2).mean(2), per_channel))


def vrmse(pred: Tensor, truth: Tensor, *, per_channel: bool = False, ndim: int = 2) -> Tensor:
    """Returns the variance-scaled root mean squared error of each field, ``sqrt(mean(err^2) / (var(truth) + 1e-7))`` over cells.

    Predicting the field's mean gives 1. The variance is the unbiased one, as in The Well. Arguments, shapes and errors are those of
    ``rollout_mse``; without ``per_channel``, the mean over fields.

    Source: Ohana et al., The Well, 2024; its VRMSE (norm_mode "std").
    """
    return _over_frames(pred, truth, ndim, lambda p, t: _root(p, t, t.flatten(2).var(2), per_channel))


def relative_l1(
    pred: Tensor,
    truth: Tensor,
    *,
    mean: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    per_channel: bool = False,
    ndim: int = 2,
) -> Tensor:
    """Returns the relative L1 error ``sum |pred - truth| / sum |truth|`` over channels and cells of a frame, as a fraction.

    Poseidon reports 100 times this on normalised fields: pass the training ``mean`` and ``scale`` (numbers or ``[C]``) to apply
    ``(x - mean) / scale`` to both sides. A zero truth is divided by 1e-10, as there. With ``per_channel`` each field is divided by its own
    sum. Other arguments, shapes and errors are those of ``rollout_mse``.

    Source: Herde et al., Poseidon: Efficient Foundation Models for PDEs, 2024; its relative_lp_error with p = 1.
    """

    def frame(p: Tensor, t: Tensor) -> Tensor:
        if mean is not None:
            shift = _channelwise("mean", mean, t)
            p, t = p - shift, t - shift
        if scale is not None:
            factor = _channelwise("scale", scale, t, positive=True)
            p, t = p / factor, t / factor
        error, size = (p - t).abs().flatten(2).sum(2), t.abs().flatten(2).sum(2)
        if not per_channel:
            error, size = error.sum(1), size.sum(1)
        return error / torch.where(size == 0, 1e-10, size)

    return _over_frames(pred, truth, ndim, frame)


def _over_frames(pred: Tensor, truth: Tensor, ndim: int, frame: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Applies ``frame`` to float64 frames ``[N, C, *S]``, one at a time, so that float64 costs one frame of memory."""
    p, t, single = matched(pred, truth, ndim)
    out = torch.stack([frame(p[:, i].double(), t[:, i].double()) for i in range(t.shape[1])], 1)
    return out[0] if single else out


def _root(p: Tensor, t: Tensor, size: Tensor, per_channel: bool) -> Tensor:
    """Root of the mean squared error of each field over ``size [N, C]``."""
    return _mean_channels(((p - t).square().flatten(2).mean(2) / (size + _EPS)).sqrt(), per_channel)


def _mean_channels(value: Tensor, per_channel: bool) -> Tensor:
    return value if per_channel else value.mean(1)


def _channelwise(name: str, value: float | Tensor, like: Tensor, *, positive: bool = False) -> Tensor:
    """``value`` as float64 ``[C or 1, 1, ...]`` that broadcasts over frames ``[N, C, *S]``."""
    v = torch.as_tensor(value, dtype=torch.float64, device=like.device).flatten()
    if v.numel() not in (1, like.shape[1]):
        raise ValueError(f"{name} has {v.numel()} values; give one number, or one for each of the {like.shape[1]} channels")
    if positive and not bool((v > 0).all()):
        raise ValueError(f"{name} is {v.tolist()}; every value must be positive")
    return v.reshape(-1, *[1] * (like.ndim - 2))
