"""How much better each problem became, and how many did."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_gain(mse_baseline: Tensor, mse_ttc: Tensor) -> Tensor:
    """Improvement of each problem in percent, ``100 (baseline - ttc) / (baseline + 1e-12)``; negative where it got worse.

    Args:
        mse_baseline: errors of the baseline, ``[N]`` (any shape).
        mse_ttc: errors of the method, same shape.

    Returns:
        Percent, same shape, float64. NaN where either error is NaN.

    Raises:
        ValueError: the shapes differ.

    Source: seeds/ttc-integration-plan.md section 7.
    """
    baseline, ttc = _pair(mse_baseline, mse_ttc)
    return 100.0 * (baseline - ttc) / (baseline + 1e-12)


def fraction_improved(mse_baseline: Tensor, mse_ttc: Tensor) -> float:
    """Percentage of problems whose error became strictly smaller, 0 to 100.

    A NaN counts as the largest error: against a finite baseline it is no improvement, and a finite error improves on a NaN one.

    Raises:
        ValueError: the shapes differ, or there is no problem.

    Source: seeds/ttc-integration-plan.md section 7.
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
