"""Whether candidates differ at all."""

from __future__ import annotations

import torch
from torch import Tensor

_ROUNDING = 8  # units of the dtype's eps, relative to a channel's largest value: what batching a matrix product differently may change


class DeterministicModelError(ValueError):
    """A model that gives the same next state every time, where several candidates were asked for."""


def all_same(first: Tensor, others: Tensor) -> bool:
    """Whether ``others [N, B, C, *S]`` equal ``first [N, C, *S]`` up to rounding in every candidate; NaN counts as different.

    Rounding is measured problem by problem and channel by channel: next to an energy of 1e5, or to a problem that blows up, a density
    of 1 keeps its own.
    """
    largest = first.abs().flatten(2).amax(2).reshape(*first.shape[:2], *[1] * (first.ndim - 2))
    limit = _ROUNDING * torch.finfo(first.dtype).eps * largest  # [N, C, 1...]
    # one candidate at a time: models that are stochastic leave at the first
    return all(bool(((others[:, b] - first).abs() <= limit).all()) for b in range(others.shape[1]))


def require_distinct(candidates: Tensor, model: object, what: str = "candidates of a step") -> None:
    """Raise ``DeterministicModelError`` if the candidates ``[N, B, C, *S]`` (``what`` they are called) are all the same for every problem.

    Source: DECISIONS 8.
    """
    if candidates.shape[1] > 1 and all_same(candidates[:, 0], candidates[:, 1:]):
        raise deterministic_error(model, f"{candidates.shape[1]} {what} are all the same")


def deterministic_error(model: object, why: str) -> DeterministicModelError:
    return DeterministicModelError(
        f"{type(model).__name__} stays deterministic: {why}; set a dropout rate "
        "(StochasticConfig dropout_p=), inject dropout behind named modules (dropout_after=), add noise (input_eps=, latent_sigma=), "
        "set chunk_size=1 for a model that draws its noise once per call, or use branching_factor=1"
    )
