"""Measures how much each problem improved, and how many did."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_gain(mse_baseline: Tensor, mse_ttc: Tensor) -> Tensor:
    """Returns the improvement of each problem in percent, ``100 (baseline - ttc) / (baseline + 1e-12)``; negative where it got worse.

    Args:
        mse_baseline: Errors of the baseline, ``[N]`` or any shape.
        mse_ttc: Errors of the method, same shape.

    Returns:
        Percentages, same shape, float64; NaN where either error is NaN.

    Raises:
        ValueError: Shapes differ.

    Source: TTC plan, "Metrics & Evaluation".
    """
    baseline, ttc = _pair(mse_baseline, mse_ttc)
    return 100.0 * (baseline - ttc) / (baseline + 1e-12)


def fraction_improved(mse_baseline: Tensor, mse_ttc: Tensor) -> float:
    """Returns the percentage of problems whose error became strictly smaller, 0 to 100.

    NaN counts as the largest error: it never improves on a finite baseline, and a finite error improves on NaN.

    Raises:
        ValueError: Shapes differ, or there is no problem.

    Source: TTC plan, "Metrics & Evaluation".
    """
    baseline, ttc = (x.nan_to_num(nan=float("inf"), posinf=float("inf")) for x in _pair(mse_baseline, mse_ttc))
    if baseline.numel() == 0:
        raise ValueError("mse_baseline is empty; give the error of at least one problem")
    return 100.0 * (ttc < baseline).double().mean().item()


def _pair(baseline: Tensor, ttc: Tensor) -> tuple[Tensor, Tensor]:
    b, t = torch.as_tensor(baseline, dtype=torch.float64), torch.as_tensor(ttc, dtype=torch.float64)
    if b.shape != t.shape:
        raise ValueError(f"mse_baseline has shape {tuple(b.shape)} and mse_ttc {tuple(t.shape)}; give one error per problem in both")
    return b, t
