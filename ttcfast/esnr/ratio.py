"""The signal-to-noise ratio of a gradient estimate (ESNR), from the gradients of M microbatches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 1 << 20  # numbers, over all microbatches, that are converted to float64 at a time
RESOLUTION = 2.0**-52  # a variance below this fraction of E||g||^2 is rounding


class ESNR(NamedTuple):
    """Signal and noise of M microbatch gradients ``g_i`` of b samples each, with mean ``mu``.

    Where all gradients are zero the ratios are NaN; where one is not finite, everything but M is NaN or inf.

    Attributes:
        raw: ``||mu||^2 / max(Var, eps)`` with ``Var = E||g||^2 - ||mu||^2``, as in the plan. eps is 2^-52 of ``E||g||^2``, so a gradient
            without noise reads at most 4.5e15 (157 dB). It is biased: its mean is ``1/(M-1)`` for pure noise and ``(rho + 1/M) M/(M-1)``
            for a true ratio rho.
        raw_db: ``10 log10`` of ``raw``, NaN unless ``raw`` is positive.
        unbiased: ``((M-1) raw - 1) / M``, the ratio of the unbiased estimates of ``||E g||^2`` and of the trace of a microbatch gradient's
            covariance; it may be negative. Like ``raw`` it grows with b, so compare values of equal b, and average over time the two
            estimates before taking the ratio (``ESNRMeter.smoothed``).
        unbiased_db: ``10 log10`` of ``unbiased``, NaN unless ``unbiased`` is positive.
        mean_sq_norm: ``E||g||^2``; ``||mu||^2 = mean_sq_norm - (M-1)/M trace_var``.
        trace_var: Unbiased trace of the covariance, ``M/(M-1) Var``.
        M: Number of microbatches.
        noise_scale: Simple gradient-noise scale ``b trace_var / ||E g||^2`` (unbiased) in samples, the batch size at which noise and signal
            are equal; NaN unless ``unbiased`` is positive.

    Source: Flow plan, "ESNR"; docs/design/decisions.md ("ESNR"); McCandlish et al., "An empirical model of
    large-batch training", 2018, for the noise scale.
    """

    raw: float
    raw_db: float
    unbiased: float
    unbiased_db: float
    mean_sq_norm: float
    trace_var: float
    M: int
    noise_scale: float


def esnr(grads: Tensor | Sequence[Tensor | Sequence[Tensor]], *, microbatch_size: int = 1) -> ESNR:
    """Return the signal-to-noise ratio of the gradients of M microbatches.

    Args:
        grads: Floating-point gradients: ``[M, P]``, or for each of the M microbatches one tensor or one list with a tensor per parameter.
        microbatch_size: Samples b per microbatch; only ``noise_scale`` depends on it.

    Returns:
        The ESNR, computed from centred sums in float64, so that it stays exact when the noise is small beside the mean.

    Raises:
        ValueError: M is below 2, shapes differ between microbatches, or devices or dtypes are mixed.
    """
    if microbatch_size < 1:
        raise ValueError(f"microbatch_size is {microbatch_size}; it must be at least 1")
    sums, count = [], 0
    with torch.no_grad():
        for column in _columns(grads):
            count = column.shape[0]
            for part in column.split(max(1, COLUMNS // count), dim=1):
                values = part.double()
                mean = values.mean(0)
                sums.append(torch.stack([mean.square().sum(), (values - mean).square().sum() / count]))
        square_of_mean, variance = torch.stack(sums).sum(0).tolist() if sums else (0.0, 0.0)
    return ratios(square_of_mean, variance, count, microbatch_size)


def ratios(square_of_mean: float, variance: float, count: int, microbatch_size: int) -> ESNR:
    """Return the ESNR of ``||mu||^2`` and ``Var = E||g||^2 - ||mu||^2``; a ``Var`` that rounding made negative counts as 0."""
    variance = 0.0 if variance < 0 else variance
    mean_square = square_of_mean + variance
    floor = max(variance, RESOLUTION * mean_square) if math.isfinite(variance) else variance
    raw = square_of_mean / floor if floor else math.nan
    unbiased = ((count - 1) * raw - 1) / count
    return ESNR(
        raw,
        _decibel(raw),
        unbiased,
        _decibel(unbiased),
        mean_square,
        variance * count / (count - 1),
        count,
        microbatch_size / unbiased if unbiased > 0 else math.nan,
    )


def _decibel(ratio: float) -> float:
    return 10 * math.log10(ratio) if ratio > 0 else math.nan


def _columns(grads: Tensor | Sequence[Tensor | Sequence[Tensor]]) -> Iterator[Tensor]:
    """Yield the gradients of each parameter, ``[M, n]``."""
    if isinstance(grads, Tensor) and grads.ndim != 2:
        raise ValueError(f"grads has shape {tuple(grads.shape)}; expected [M, P]")
    lists = grads if isinstance(grads, Tensor) else [[entry] if isinstance(entry, Tensor) else list(entry) for entry in grads]
    if len(lists) < 2:
        raise ValueError(f"M is {len(lists)}; ESNR needs the gradients of at least 2 microbatches")
    if isinstance(lists, Tensor):
        _check_kind("grads", lists, lists)
        yield lists.detach()
        return
    if not lists[0] or len({len(entry) for entry in lists}) > 1:
        raise ValueError(f"the microbatches have {', '.join(str(len(entry)) for entry in lists)} gradients; give each one per parameter")
    for p, column in enumerate(zip(*lists)):
        for m, grad in enumerate(column):
            _check_kind(f"grads[{m}][{p}]", grad, lists[0][0])
            if grad.shape != column[0].shape:
                raise ValueError(f"grads[{m}][{p}] has shape {tuple(grad.shape)} and grads[0][{p}] {tuple(column[0].shape)}")
        yield torch.stack([grad.detach().flatten() for grad in column])


def _check_kind(name: str, grad: Tensor, first: Tensor) -> None:
    if not isinstance(grad, Tensor):
        raise ValueError(f"{name} is {grad!r}; leave out parameters that have no gradient")
    if not grad.is_floating_point():
        raise ValueError(f"{name} is {grad.dtype}; gradients are floating point")
    if (grad.dtype, grad.device) != (first.dtype, first.device):
        raise ValueError(
            f"{name} is {grad.dtype} on {grad.device} and the first gradient {first.dtype} on {first.device}; "
            "give all in one dtype on one device"
        )
