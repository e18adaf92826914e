"""Measures the single-step error of a surrogate beside that of persistence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttcfast.core.base_fm import Surrogate
from ttcfast.core.context import window_at
from ttcfast.metrics import relative_l1


class OneStepError(NamedTuple):
    """Mean relative L1 errors over trajectories and frames, as fractions, of the deterministic step and of copying the last frame."""

    surrogate: float
    persistence: float


@torch.no_grad()
def one_step_error(surrogate: Surrogate, truth: Tensor, *, batch: int = 64) -> OneStepError:
    """Return the mean error of single steps from every true state.

    Args:
        surrogate: The model, with history h.
        truth: ``[N, h+T, C, *S]`` in physical units, of which frame h - 1 is the first to step from. Fields that are not given are
            compared in the surrogate's normalised units, as in Poseidon.
        batch: Number of states through the model at once.
    """
    normalizer, spec, h = surrogate.normalizer, surrogate.spec, surrogate.history
    mean, scale = (None, None) if normalizer is None else (spec.predicted(x, channel_axis=0) for x in (normalizer.mean, normalizer.std))
    before, after = truth[:, h - 1 : -1], truth[:, h:]
    ids = torch.arange(len(truth))
    steps = torch.stack([_step(surrogate, window_at(truth, t, h), t, ids, batch) for t in range(before.shape[1])], 1)
    steps, before, after = (spec.predicted(x, channel_axis=2) for x in (steps, before, after))
    errors = (float(relative_l1(guess, after, mean=mean, scale=scale, ndim=spec.ndim).mean()) for guess in (steps, before))
    return OneStepError(*errors)


def _step(surrogate: Surrogate, state: Tensor, step: int, ids: Tensor, batch: int) -> Tensor:
    pieces = zip(state.split(batch), ids.split(batch), strict=True)
    return torch.cat([surrogate.deterministic(x, step=step, problem_ids=own) for x, own in pieces])
