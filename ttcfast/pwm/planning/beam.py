"""A beam search over latent states: each kept state is expanded by many actions, the best of all are kept, step after step.

It is the search of ``ttcfast/ttc`` with actions in place of noise: candidates are keyed, come in chunks, are ranked by the value so far
(plus the critic's value of where they lead) and kept by the same total order; of equal states only the best is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ttcfast.ops.ranking import Keys, best, marks_of

from .imagined import Imagined, Sequences, better, finite, moments, picked


class Beams(NamedTuple):
    """Kept states ``[N, b, L]``, rewards so far ``[N, b]``, and the actions that led there ``[N, b, t, A]``; -inf marks an empty place."""

    z: Tensor
    total: Tensor
    actions: Tensor


def search(imagined: Imagined, guesses: Sequences, hint: Tensor) -> tuple[Sequences, Tensor]:
    """Return the best sequence, ``[N, 1, H, A]``, guesses included, and the deviation among the kept ones, ``[N, H, A]``.

    Args:
        imagined: The problems.
        guesses: Whole sequences that the result competes with.
        hint: A sequence ``[N, H, A]`` whose action is tried from every beam at each step.
    """
    n, a = imagined.n, imagined.model.action_dim
    beams = Beams(imagined.z.unsqueeze(1), imagined.z.new_zeros(n, 1), imagined.z.new_zeros(n, 1, 0, a))
    values = beams.total
    for t in range(imagined.settings.horizon):
        beams, values = _expanded(imagined, t, beams, hint[:, t])
    found = Sequences(beams.actions, values)
    return better(guesses.best(), found.one(0)), moments(found, 0.0)[1]


def _expanded(imagined: Imagined, t: int, beams: Beams, hint: Tensor) -> tuple[Beams, Tensor]:
    """Return the beams after one more step, best first, and their values ``[N, b]``: what is earned so far plus the critic's estimate."""
    s, n, count = imagined.settings, imagined.n, beams.z.shape[1]
    k = min(s.width, count * s.samples)
    centre = imagined.act(beams.z) if imagined.policy is not None else hint.unsqueeze(1).expand(-1, count, -1)
    held = Keys.empty(n, k, beams.z.dtype, beams.z.device, marks=True)
    z, actions = beams.z.new_zeros(n, k, beams.z.shape[2]), beams.z.new_zeros(n, k, hint.shape[1])
    for ids in imagined.chunks(count * s.samples):
        parent = ids // s.samples
        tried = _tried(imagined, t, ids, picked(centre, parent), hint)
        following, reward = imagined.step(picked(beams.z, parent), tried)
        total = beams.total.gather(1, parent) + s.gamma**t * reward
        rank = finite(total + imagined.discounted(t + 1, following))
        held, places = best(held.beside(Keys(rank, ids, total, marks=marks_of(following, 2))), k)
        z, actions = picked(torch.cat([z, following], 1), places), picked(torch.cat([actions, tried], 1), places)
    parent = (held.ids // s.samples).clamp_max(count - 1)  # an empty place has no parent
    path = torch.cat([picked(beams.actions, parent), actions.unsqueeze(2)], 2)
    return Beams(z, held.scores.masked_fill(held.rank == -torch.inf, -torch.inf), path), held.rank


def _tried(imagined: Imagined, t: int, ids: Tensor, centre: Tensor, hint: Tensor) -> Tensor:
    """Return the action of each candidate, ``[N, c, A]``.

    From each beam: the policy's action (without a policy the hint), the hint, then in turn noise around the former and uniform draws.
    """
    place = (ids % imagined.settings.samples).unsqueeze(2)
    noise = imagined.noise(1 + t, ids, hint.shape[1])
    uniform = 4 * noise - 2 * (2 * noise).round()  # a normal of deviation 4 modulo 2 is uniform on [-1, 1] but for 1e-34
    near = centre + imagined.settings.policy_noise * noise
    tried = torch.where(place % 2 == 0, near, uniform)
    tried = torch.where(place == 0, centre, torch.where(place == 1, hint.unsqueeze(1), tried))
    return imagined.legal(tried)
