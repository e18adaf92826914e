"""Plans: action sequences of high value in a world model, for a batch of problems at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.runtime.errors import ArgumentError

from . import beam, gaussian
from .imagined import Function, Imagined, LatentModel, Sequences
from .settings import PlanSettings


@dataclass(frozen=True)
class Plan:
    """The best action sequences found for N problems.

    Attributes:
        actions: Actions in [-1, 1], ``[N, H, A]``.
        value: Their discounted value by the model, ``[N]``: rewards of H steps, plus the critic's value of the last state.
        std: Spread of the search, ``[N, H, A]``: the last deviation of the Gaussian, or that among the kept beams (NaN if there are none).
        fallback: Whether no candidate had a finite value, bool ``[N]``. The actions are then those of the policy, or 0 without one, and the
            value is -inf.
        evaluations: Model steps made for all problems together, each of one state and one action.
    """

    actions: Tensor
    value: Tensor
    std: Tensor
    fallback: Tensor
    evaluations: int


def plan(
    model: LatentModel,
    z: Tensor,
    horizon: int,
    samples: int,
    *,
    policy: Function | None = None,
    value: Function | None = None,
    task: Any = None,
    seed: int = 0,
    step: int = 0,
    warm: Tensor | None = None,
    problem_ids: Tensor | None = None,
    **settings: Any,
) -> Plan:
    """Search action sequences of high value in a world model.

    The best sequence that any candidate made is returned, and it is never worse, by the model's value, than the policy's own sequence and
    the warm start. Candidates depend on (seed, step, iteration, problem, candidate) alone. Plans are therefore the same for every
    ``chunk_size`` and in every batch, bit for bit as far as the model's results for a state do not depend on other states (matrix
    products of a GPU may round differently in batches of different size).

    Args:
        model: A :class:`ttcfast.pwm.models.BaseWorldModel`, or any object with ``latent_dim``, ``action_dim`` and ``step``. Modules among
            model, policy and value are in eval mode meanwhile, and no gradient is recorded.
        z: Latent states to plan from, ``[N, latent_dim]``, on the model's device.
        horizon: Steps to look ahead, H.
        samples: Sequences drawn per iteration ("mppi", "cem"), or actions tried from each beam at each step ("beam").
        policy: Maps latent states ``[N, c, latent_dim]`` to actions ``[N, c, A]``; its sequences take part, and the search starts there.
        value: Maps latent states ``[N, c, latent_dim]`` to values ``[N, c]``, the critic of what comes after the horizon; "beam" also ranks
            unfinished sequences by it.
        task: One task index or name for all problems, or int64 indices ``[N]``; None for a model of a single task.
        seed: Random seed of the noise.
        step: Step of the episode, so that each step has noise of its own.
        warm: A sequence to start from, ``[N, H, A]``, such as the last plan shifted by a step; NaN where nothing is known, which is filled
            from the policy's sequence, or by 0.
        problem_ids: Identifiers of the problems, int64 ``[N]``, which name their noise; None for 0 to N - 1.
        settings: Further fields of :class:`PlanSettings`, such as ``method``.

    Raises:
        ArgumentError: A setting is out of range, or a shape does not fit.
    """
    chosen = PlanSettings(horizon, samples, **settings)
    return search(model, z, chosen, policy=policy, value=value, task=task, seed=seed, step=step, warm=warm, problem_ids=problem_ids)


@torch.no_grad()
def search(model: LatentModel, z: Tensor, settings: PlanSettings, *, warm: Tensor | None = None, **given: Any) -> Plan:
    """Do what :func:`plan` does, with ``settings`` made before; ``given`` are its other arguments."""
    with _evaluating(model, given.get("policy"), given.get("value")):
        imagined = Imagined(model, z, settings, **given)
        guesses, start = _guesses(imagined, warm)
        method = beam if settings.method == "beam" else gaussian
        found, std = method.search(imagined, guesses, start)
    values = found.values[:, 0]
    return Plan(found.actions[:, 0], values, std, values == -torch.inf, imagined.steps)


def _guesses(imagined: Imagined, warm: Tensor | None) -> tuple[Sequences, Tensor]:
    """Return the candidates known before the search, the fallback first, and the sequence ``[N, H, A]`` to start from."""
    shape = (imagined.n, imagined.settings.horizon, imagined.model.action_dim)
    if imagined.policy is not None:
        guesses = imagined.policy_sequences()
    else:
        still = imagined.z.new_zeros(imagined.n, 1, *shape[1:])
        guesses = Sequences(still, imagined.values(still))
    if warm is None:
        return guesses, guesses.actions[:, 0]
    if warm.shape != shape:
        raise ArgumentError(f"warm has shape {tuple(warm.shape)}; give a sequence for each problem, {shape}")
    start = imagined.legal(torch.where(warm.isnan(), guesses.actions[:, 0], warm.to(imagined.z.dtype)))
    sequence = start.unsqueeze(1)
    return guesses.beside(Sequences(sequence, imagined.values(sequence))), start


@contextlib.contextmanager
def _evaluating(*parts: Any) -> Iterator[None]:
    """Put the modules among ``parts`` into eval mode within the block."""
    training = [module for part in parts if isinstance(part, nn.Module) for module in part.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
