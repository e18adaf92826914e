"""ESNR, the signal-to-noise ratio of a gradient estimate, from the gradients of M microbatches."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 1 << 20  # numbers of all microbatches together that are turned into float64 at a time
RESOLUTION = 2.0**-52  # of E||g||^2: a variance below it is rounding


class ESNR(NamedTuple):
    """Signal and noise of M microbatch gradients ``g_i`` with mean ``mu``, of b samples each.

    ``raw`` is the plan's ``||mu||^2 / max(Var, eps)``, ``Var = E||g||^2 - ||mu||^2``; eps is 2^-52 of ``E||g||^2``, so a gradient without
    noise reads 4.5e15 (157 dB) at most. It is biased: of pure noise it is ``1/(M-1)`` on average, and ``(rho + 1/M) M/(M-1)`` where the
    true ratio is rho. ``unbiased`` is the ratio of the unbiased estimates of ``||E g||^2`` and of the trace of a microbatch gradient's
    covariance, ``((M-1) raw - 1) / M``; it may be negative. Both grow with b: compare them at equal b, and averages of them over time by
    averaging the two estimates first (``ESNRMeter.smoothed``).
    ``raw_db``, ``unbiased_db`` are ``10 log10``, NaN where the estimate is not positive.
    ``mean_sq_norm`` is ``E||g||^2``, ``trace_var`` the unbiased trace ``M/(M-1) Var``; ``||mu||^2 = mean_sq_norm - (M-1)/M trace_var``.
    ``noise_scale`` is McCandlish's simple gradient-noise scale ``b trace_var / ||E g||^2`` (unbiased), in samples: the batch at which noise
    and signal are equal; NaN where ``unbiased`` is not positive.
    Where all gradients are zero the ratios are NaN; where one is not finite, everything but M is NaN or inf.

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
    """Signal-to-noise ratio of the gradients of M microbatches.

    Args:
        grads: ``[M, P]``, or one list of gradients (one per parameter) or one tensor for each of the M microbatches; floating point.
        microbatch_size: b, samples per microbatch; only ``noise_scale`` depends on it.

    Returns:
        ESNR, from centred sums in float64: exact however small the noise is beside the mean.

    Raises:
        ValueError: M < 2, shapes differ between microbatches, or devices or dtypes are mixed.
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
    """From ``||mu||^2`` and ``Var = E||g||^2 - ||mu||^2``, which rounding may have made a little negative."""
    if variance < 0:
        variance = 0.0
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
    """``[M, n]`` for each parameter."""
    if isinstance(grads, Tensor):
        if grads.ndim != 2:
            raise ValueError(f"grads has shape {tuple(grads.shape)}; expected [M, P]")
        _check_count(len(grads))
        _check_kind("grads", grads, grads)
        yield grads.detach()
        return
    lists = [[entry] if isinstance(entry, Tensor) else list(entry) for entry in grads]
    _check_count(len(lists))
    if not lists[0] or len({len(entry) for entry in lists}) > 1:
        raise ValueError(f"the microbatches have {', '.join(str(len(entry)) for entry in lists)} gradients; give each one per parameter")
    for p, column in enumerate(zip(*lists)):
        for m, grad in enumerate(column):
            _check_kind(f"grads[{m}][{p}]", grad, lists[0][0])
            if grad.shape != column[0].shape:
                raise ValueError(f"grads[{m}][{p}] has shape {tuple(grad.shape)} and grads[0][{p}] {tuple(column[0].shape)}")
        yield torch.stack([grad.detach().flatten() for grad in column])


def _check_count(count: int) -> None:
    if count < 2:
        raise ValueError(f"M is {count}; ESNR needs the gradients of at least 2 microbatches")


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
