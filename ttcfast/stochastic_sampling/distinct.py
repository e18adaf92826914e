"""Whether candidates differ at all."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 8  # units of the dtype's eps, relative to the largest value: what batching a matrix product differently may change


class DeterministicModelError(ValueError):
    """A model that gives the same next state every time, where several candidates were asked for."""


def all_same(first: Tensor, others: Tensor) -> bool:
    """Whether ``others [N, B, ...]`` equal ``first [N, ...]`` up to rounding in every candidate; NaN counts as different."""
    limit = _ROUNDING * torch.finfo(first.dtype).eps * first.abs().amax()
    # one candidate at a time: models that are stochastic leave at the first
    return all(bool(((others[:, b] - first).abs() <= limit).all()) for b in range(others.shape[1]))


def require_distinct(candidates: Tensor, model: object) -> None:
    """Raise ``DeterministicModelError`` if the candidates ``[N, B, ...]`` are all the same for every problem.

    Source: DECISIONS 8.
    """
    if candidates.shape[1] > 1 and all_same(candidates[:, 0], candidates[:, 1:]):
        raise deterministic_error(candidates.shape[1], model)


def deterministic_error(count: int, model: object) -> DeterministicModelError:
    return DeterministicModelError(
        f"{type(model).__name__} stays deterministic: {count} candidates of a step are all the same; set a dropout rate "
        "(StochasticConfig dropout_p=), inject dropout behind named modules (dropout_after=), add noise (input_eps=, latent_sigma=), "
        "set chunk_size=1 for a model that draws its noise once per call, or use branching_factor=1"
    )
