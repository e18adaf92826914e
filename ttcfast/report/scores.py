"""Scores of arms over tasks and random seeds: interquartile mean and performance profile, with stratified bootstrap intervals.

Source: Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", 2021 (arXiv:2108.13264).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ttcfast.pwm.policy_result import PolicyResult

from .policies import final_return

BEST = 1000.0
"""Highest return of a task of dm_control."""
RESAMPLES = 2000
THRESHOLDS = np.linspace(0, 1, 101)
Scores = Mapping[str, Sequence[float]]


def scores_of(results: Sequence[PolicyResult]) -> dict[str, dict[str, list[float]]]:
    """Return final returns over ``BEST`` by arm and task, on the dm_control tasks for which every arm has a run with a return."""
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in dict.fromkeys(run.arm for run in results)}
    for run in results:
        if ":" not in run.task and math.isfinite(value := final_return(run)):
            found[run.arm].setdefault(run.task, []).append(value / BEST)
    shared = set.intersection(*(set(tasks) for tasks in found.values())) if found else set()
    return {arm: {task: values for task, values in tasks.items() if task in shared} for arm, tasks in found.items()} if shared else {}


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without the lowest and the highest quarter (rounded down) of the values."""
    cut = values.shape[-1] // 4
    return np.sort(values, -1)[..., cut : values.shape[-1] - cut].mean(-1)


def with_interval(scores: Scores, statistic: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ``statistic`` of all scores, and its 95 % interval by a bootstrap that draws the runs of every task anew.

    Args:
        scores: Scores of the runs by task.
        statistic: Maps ``[..., runs]`` to ``[...]`` or ``[..., n]``.
    """
    rng = np.random.default_rng(0)
    drawn = np.concatenate([np.asarray(values)[rng.integers(len(values), size=(RESAMPLES, len(values)))] for values in scores.values()], 1)
    low, high = np.quantile(statistic(drawn), [0.025, 0.975], axis=0)
    return statistic(np.concatenate([np.asarray(values) for values in scores.values()])), low, high


def shares_above(values: np.ndarray) -> np.ndarray:
    """Return the performance profile: the share of ``values [..., runs]`` above each of ``THRESHOLDS``, ``[..., thresholds]``."""
    return np.stack([(values > threshold).mean(-1) for threshold in THRESHOLDS], -1)
