"""Errors of a rollout against the truth, per time step, under the names the field knows. Everything is summed in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .layout import matched

_EPS = 1e-7  # The Well's, added to a mean square or a variance in the field's own units


def rollout_mse(pred: Tensor, truth: Tensor, *, scale: float | Tensor | None = None, per_channel: bool = False, ndim: int = 2) -> Tensor:
    """Mean squared error of every frame, ``mean(((pred - truth) / scale)^2)`` over channels and cells.

    Args:
        pred: trajectory ``[N, T+1, C, *S]`` or ``[C, T+1, *S]``, physical units. Frames beyond the truth's last are left out.
        truth: trajectory of the same layout, at most as long.
        scale: a number or one per channel ``[C]``, in the channels' units (for instance their standard deviations); None means 1.
        per_channel: keep the channels apart.
        ndim: number of space axes, which tells the two layouts apart.

    Returns:
        float64 ``[N, T+1]`` (``[T+1]`` for one trajectory), with a last axis ``[C]`` if ``per_channel``. NaN where ``pred`` has NaN.

    Raises:
        ValueError: shapes that do not agree, a truth longer than the prediction, a scale of another length or not positive.

    Source: seeds/ttc-integration-plan.md section 7.
    """

    def frame(p: Tensor, t: Tensor) -> Tensor:
        error = p - t
        if scale is not None:
            error = error / _channelwise("scale", scale, t, positive=True)
        return _mean_channels(error.square().flatten(2).mean(2), per_channel)

    return _over_frames(pred, truth, ndim, frame)


def nrmse(pred: Tensor, truth: Tensor, *, per_channel: bool = False, ndim: int = 2) -> Tensor:
    """Normalised root mean squared error ``sqrt(mean(err^2) / (mean(truth^2) + 1e-7))`` of each field, over the cells of a frame.

    Arguments, shapes and errors as ``rollout_mse``; without ``per_channel`` the mean over the fields.

    Source: The Well, ``benchmark/metrics/spatial.py`` (NRMSE with norm_mode "norm").
    """

    def frame(p: Tensor, t: Tensor) -> Tensor:
        power = t.square().flatten(2).mean(2)
        return _mean_channels(((p - t).square().flatten(2).mean(2) / (power + _EPS)).sqrt(), per_channel)

    return _over_frames(pred, truth, ndim, frame)


def vrmse(pred: Tensor, truth: Tensor, *, per_channel: bool = False, ndim: int = 2) -> Tensor:
    """Variance-scaled root mean squared error ``sqrt(mean(err^2) / (var(truth) + 1e-7))`` of each field, over the cells of a frame.

    1 is the error of predicting the field's mean. Arguments, shapes and errors as ``rollout_mse``; without ``per_channel`` the mean
    over the fields. The variance is the unbiased one, as in The Well's code.

    Source: The Well, ``benchmark/metrics/spatial.py`` (VRMSE, the norm_mode "std").
    """

    def frame(p: Tensor, t: Tensor) -> Tensor:
        variance = t.flatten(2).var(2)
        return _mean_channels(((p - t).square().flatten(2).mean(2) / (variance + _EPS)).sqrt(), per_channel)

    return _over_frames(pred, truth, ndim, frame)


def relative_l1(
    pred: Tensor,
    truth: Tensor,
    *,
    mean: float | Tensor | None = None,
    scale: float | Tensor | None = None,
    per_channel: bool = False,
    ndim: int = 2,
) -> Tensor:
    """Relative L1 error ``sum |pred - truth| / sum |truth|`` over channels and cells of a frame, as a fraction.

    Poseidon reports 100 times this, on normalised fields: pass the training ``mean`` and ``scale`` (numbers or ``[C]``) to have
    ``(x - mean) / scale`` on both sides. A truth that is zero everywhere is divided by 1e-10, as there. Other arguments, shapes and
    errors as ``rollout_mse``; with ``per_channel`` each field is divided by its own sum.

    Source: Poseidon, ``scOT/metrics.py`` (relative_lp_error, p = 1).
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
    """Apply ``frame`` to float64 frames ``[N, C, *S]``: one at a time, so that float64 costs one frame of memory."""
    p, t, single = matched(pred, truth, ndim)
    out = torch.stack([frame(p[:, i].double(), t[:, i].double()) for i in range(t.shape[1])], 1)
    return out[0] if single else out


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
