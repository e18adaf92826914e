"""MPPI and CEM: sequences are drawn from a Gaussian, which is refitted to the best of them, several times.

MPPI weighs the elites by ``softmax(temperature * value)``; CEM is the same with temperature 0. Elites are kept as values and ids while
chunks of sequences come and go, and are drawn again by their keys, so that memory does not grow with the number of samples and the result
does not depend on the chunks. The best sequence met is the plan, as in iCEM, not the mean, which takes part as a candidate.

Source: Williams et al., "Information theoretic MPC for model-based reinforcement learning" (2017), in the form of TD-MPC2 (Hansen, Su and
Wang, 2023); Rubinstein and Kroese, "The cross-entropy method" (2004); Pinneri et al., "Sample-efficient cross-entropy method for real-time
planning" (2020).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttcfast.ops.ranking import Keys, best

from .imagined import Imagined, Sequences, better, moments, picked


def search(imagined: Imagined, guesses: Sequences, mean: Tensor) -> tuple[Sequences, Tensor]:
    """Refine a Gaussian over sequences, and return the best sequence met, ``[N, 1, H, A]``, and the last deviation ``[N, H, A]``.

    Args:
        imagined: The problems.
        guesses: Candidates that take part in every iteration.
        mean: Mean to start from, ``[N, H, A]``; candidate 0 of every iteration is the mean.
    """
    s = imagined.settings
    temperature = s.temperature if s.method == "mppi" else 0.0
    std, found = torch.full_like(mean, s.std_max), guesses.best()
    for iteration in range(s.iterations):
        elites = _elites(imagined, 1 + iteration, guesses, mean, std)
        found = better(found, elites.one(0))
        fitted, spread = moments(elites, temperature)
        known = ~fitted.isnan()  # a problem without a finite candidate keeps its Gaussian
        mean = torch.where(known, fitted, mean)
        std = torch.where(known, spread.clamp(s.std_min, s.std_max), std)
    last = imagined.legal(mean).unsqueeze(1)
    return better(found, Sequences(last, imagined.values(last))), std


def _elites(imagined: Imagined, site: int, guesses: Sequences, mean: Tensor, std: Tensor) -> Sequences:
    """Return the best of guesses and drawn sequences, best first; of equal ones those drawn first."""
    s, k = imagined.settings, imagined.settings.elite_count

    def drawn(ids: Tensor) -> Tensor:
        noise = imagined.noise(site, ids, *mean.shape[1:]) * (ids > 0)[..., None, None]
        return imagined.legal(mean.unsqueeze(1) + std.unsqueeze(1) * noise)

    count = guesses.values.shape[1]
    guess_ids = torch.arange(s.samples, s.samples + count, device=mean.device).expand(imagined.n, -1)
    held = Keys.empty(imagined.n, k, mean.dtype, mean.device).beside(Keys(guesses.values, guess_ids, guesses.values))
    for ids in imagined.chunks(s.samples):
        values = imagined.values(drawn(ids))
        held, _ = best(held.beside(Keys(values, ids, values)), k)
    guessed = picked(guesses.actions, (held.ids - s.samples).clamp(0, count - 1))
    return Sequences(torch.where((held.ids >= s.samples)[..., None, None], guessed, drawn(held.ids)), held.rank)
