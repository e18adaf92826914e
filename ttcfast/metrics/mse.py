"""Keeps the plan's module path for the rollout errors; they live in ``ttcfast.metrics.rollout_errors``."""

from .rollout_errors import nrmse, relative_l1, rollout_mse, vrmse

__all__ = ["nrmse", "relative_l1", "rollout_mse", "vrmse"]
