"""Measures the single-step error of a surrogate beside that of persistence."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttcfast.core.base_fm import Surrogate
from ttcfast.metrics import relative_l1


class OneStepError(NamedTuple):
    """Mean relative L1 errors over trajectories and frames, as fractions, of the deterministic step and of copying the last frame."""

    surrogate: float
    persistence: float


@torch.no_grad()
def one_step_error(surrogate: Surrogate, truth: Tensor, *, batch: int = 64) -> OneStepError:
    """Return the mean error of single steps from every true state.

    Args:
        surrogate: Surrogate with history 1.
        truth: ``[N, T+1, C, *S]`` in physical units. Fields that are not given are compared in the surrogate's
            normalised units, as in Poseidon.
        batch: Number of states through the model at once.
    """
    if surrogate.history != 1:
        raise ValueError(f"surrogate has history {surrogate.history}; one_step_error takes surrogates that see one frame")
    normalizer, spec = surrogate.normalizer, surrogate.spec
    mean, scale = (None, None) if normalizer is None else (spec.predicted(x, channel_axis=0) for x in (normalizer.mean, normalizer.std))
    before, after = truth[:, :-1], truth[:, 1:]
    ids = torch.arange(len(truth))
    steps = torch.stack([_step(surrogate, before[:, t], t, ids, batch) for t in range(before.shape[1])], 1)
    steps, before, after = (spec.predicted(x, channel_axis=2) for x in (steps, before, after))
    errors = (float(relative_l1(guess, after, mean=mean, scale=scale, ndim=spec.ndim).mean()) for guess in (steps, before))
    return OneStepError(*errors)


def _step(surrogate: Surrogate, state: Tensor, step: int, ids: Tensor, batch: int) -> Tensor:
    pieces = zip(state.split(batch), ids.split(batch), strict=True)
    return torch.cat([surrogate.deterministic(x, step=step, problem_ids=own) for x, own in pieces])
