"""Imagined futures of a batch of problems: model, policy and critic behind one door, with their noise, chunks and count of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ttcfast.ops import normal, topk
from ttcfast.runtime.errors import ArgumentError
from ttcfast.spec import Key

from .settings import PlanSettings

Function = Callable[[Tensor], Tensor]
# Calls with fewer rows are filled up: matrix products of a few rows take other kernels, which round differently (measured with MKL
# on the models of this package: below 7 rows), so that a problem alone would differ from the same problem in a batch.
LEAST_ROWS = 16
POLICY_SITE = 0  # of the noise on the policy's sequences; the searches count theirs from 1


class LatentModel(Protocol):
    """What a planner needs of a world model; an action mask (``masked``) and task names (``task_index``) are used where there are any."""

    latent_dim: int
    action_dim: int

    def step(self, z: Tensor, a: Tensor, task: Any = None) -> tuple[Tensor, Tensor]:
        """Return the next latent states ``[..., latent_dim]`` and the rewards ``[..., 1]``."""


class Sequences(NamedTuple):
    """Candidates: actions ``[N, c, H, A]`` and values ``[N, c]``, -inf where a value is not finite."""

    actions: Tensor
    values: Tensor

    def beside(self, other: Sequences) -> Sequences:
        return Sequences(torch.cat([self.actions, other.actions], 1), torch.cat([self.values, other.values], 1))

    def one(self, place: int) -> Sequences:
        return Sequences(self.actions[:, place : place + 1], self.values[:, place : place + 1])

    def best(self) -> Sequences:
        """The best candidate alone; of equal ones the first."""
        values, place = topk(self.values, 1)
        return Sequences(picked(self.actions, place), values)


class Imagined:
    """Futures of N problems in a world model.

    Args:
        model: The world model.
        z: Latent states from which plans start, ``[N, latent_dim]``.
        settings: As for :func:`ttcfast.pwm.planning.plan`, like all that follow.
        policy, value, task: See there.
        seed, step, problem_ids: Names of the noise, see there.

    Attributes:
        steps: Model steps evaluated so far, each of one state and one action.

    Raises:
        ArgumentError: A shape does not fit.
    """

    def __init__(
        self,
        model: LatentModel,
        z: Tensor,
        settings: PlanSettings,
        *,
        policy: Function | None = None,
        value: Function | None = None,
        task: Any = None,
        seed: int = 0,
        step: int = 0,
        problem_ids: Tensor | None = None,
    ) -> None:
        if z.ndim != 2 or z.shape[0] < 1 or z.shape[1] != model.latent_dim or not z.is_floating_point():
            raise ArgumentError(f"z is {z.dtype} {tuple(z.shape)}; give floating-point states [N, {model.latent_dim}], one per problem")
        self.model, self.z, self.settings, self.policy, self.value = model, z, settings, policy, value
        self.n, self.seed, self.key_step, self.steps = len(z), seed, step, 0
        self.task = None if task is None else self._tasks(task)
        self.problem = torch.arange(self.n, device=z.device) if problem_ids is None else problem_ids
        if self.problem.dtype != torch.int64 or self.problem.shape != (self.n,):
            given = f"{self.problem.dtype} {tuple(self.problem.shape)}"
            raise ArgumentError(f"problem_ids are {given}; give int64 [{self.n}], one per row of z")

    def chunks(self, count: int) -> Iterator[Tensor]:
        """Yield the ids 0 to ``count - 1`` in chunks, int64 ``[N, c]``."""
        size = max(1, self.settings.chunk_size // self.n)
        for start in range(0, count, size):
            yield torch.arange(start, min(start + size, count), device=self.z.device).expand(self.n, -1)

    def noise(self, site: int, ids: Tensor, *shape: int) -> Tensor:
        """Return standard normals ``[N, c, *shape]`` that depend on (seed, step, site, problem, id) alone."""
        rows = torch.stack([self.problem.unsqueeze(1).expand_as(ids), ids], -1).flatten(0, 1)
        drawn = normal(len(rows), shape, key=Key(self.seed, self.key_step, site), rows=rows)
        return drawn.to(self.z.dtype).view(*ids.shape, *shape)

    def legal(self, actions: Tensor) -> Tensor:
        """Return actions ``[N, ..., A]`` within [-1, 1], 0 for NaN and for entries that the task does not have."""
        flat = actions.nan_to_num(0.0).clamp(-1, 1).reshape(self.n, -1, self.model.action_dim)
        masked = getattr(self.model, "masked", None)  # of every BaseWorldModel; a model of another kind may have no masks
        return (flat if masked is None else masked(flat, self.task)).reshape(actions.shape)

    def step(self, z: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return next states ``[N, c, L]`` and rewards ``[N, c]`` of states and actions ``[N, c, ...]``."""
        c = z.shape[1]
        following, reward = self.model.step(self._filled(z), self._filled(a), self.task)
        if reward.shape != (*following.shape[:-1], 1):
            raise ArgumentError(f"model.step returns rewards {tuple(reward.shape)} with states {tuple(following.shape)}; give [..., 1]")
        self.steps += self.n * c
        return following[:, :c], reward[:, :c, 0]

    def act(self, z: Tensor) -> Tensor:
        """Return the policy's actions ``[N, c, A]`` for states ``[N, c, L]``."""
        assert self.policy is not None
        filled = self._filled(z)
        actions, wanted = self.policy(filled), (*filled.shape[:-1], self.model.action_dim)
        if actions.shape != wanted:
            raise ArgumentError(f"policy returns {tuple(actions.shape)} for states {tuple(filled.shape)}; give {wanted}")
        return actions[:, : z.shape[1]]

    def discounted(self, depth: int, z: Tensor) -> Tensor:
        """Return the critic's values of states ``[N, c, L]`` after ``depth`` steps, discounted to the start; 0 without a critic."""
        if self.value is None:
            return z.new_zeros(z.shape[:-1])
        filled = self._filled(z)
        values, wanted = self.value(filled), tuple(filled.shape[:-1])
        if values.shape != wanted:
            raise ArgumentError(f"value returns {tuple(values.shape)} for states {tuple(filled.shape)}; give one number each, {wanted}")
        return self.settings.gamma**depth * values[:, : z.shape[1]]

    def values(self, actions: Tensor) -> Tensor:
        """Return the discounted values ``[N, c]`` of sequences ``[N, c, H, A]``."""
        return self._rolled(actions.shape[1], lambda t, z: actions[:, :, t])[1]

    def policy_sequences(self) -> Sequences:
        """Return ``policy_samples`` sequences of the policy, the first of its own actions, the others with noise added."""
        s = self.settings
        ids = torch.arange(s.policy_samples, device=self.z.device).expand(self.n, -1)
        noise = self.noise(POLICY_SITE, ids, s.horizon, self.model.action_dim) * (s.policy_noise * (ids > 0)[..., None, None])
        actions, values = self._rolled(s.policy_samples, lambda t, z: self.legal(self.act(z) + noise[:, :, t]))
        return Sequences(torch.stack(actions, 2), values)

    def _rolled(self, c: int, choose: Callable[[int, Tensor], Tensor]) -> tuple[list[Tensor], Tensor]:
        """Return the actions ``[N, c, A]`` of each step, chosen by step and state, and the values ``[N, c]`` of the c futures."""
        z, total, actions = self.z.unsqueeze(1).expand(-1, c, -1), self.z.new_zeros(self.n, c), []
        for t in range(self.settings.horizon):
            actions.append(choose(t, z))
            z, reward = self.step(z, actions[-1])
            total = total + self.settings.gamma**t * reward
        return actions, finite(total + self.discounted(self.settings.horizon, z))

    def _filled(self, x: Tensor) -> Tensor:
        """Repeat the last candidates of ``x [N, c, D]`` up to ``LEAST_ROWS`` rows; contiguous, since strides may choose kernels too."""
        missing = -(-LEAST_ROWS // self.n) - x.shape[1]
        return x.contiguous() if missing <= 0 else torch.cat([x, x[:, -1:].expand(-1, missing, -1)], 1)

    def _tasks(self, task: Any) -> Tensor:
        """Return the task of each problem, int64 ``[N, 1]``; on the device at once, since a name at each step would make the host wait."""
        index = task if isinstance(task, Tensor) else self.model.task_index(task, self.z.device)  # type: ignore[attr-defined]
        if index.ndim > 1 or (index.ndim == 1 and len(index) != self.n):
            raise ArgumentError(f"task has shape {tuple(index.shape)}; give one task, or one per problem, [{self.n}]")
        return index.to(self.z.device).expand(self.n).unsqueeze(1)


def finite(values: Tensor) -> Tensor:
    """Return ``values`` with -inf for all that are not finite, so that a broken model's rewards, infinite ones too, cannot win."""
    return values.masked_fill(~values.isfinite(), -torch.inf)


def picked(x: Tensor, places: Tensor) -> Tensor:
    """Return the candidates of ``x [N, c, ...]`` at ``places [N, k]``, ``[N, k, ...]``."""
    return x[torch.arange(len(x), device=x.device).unsqueeze(1), places]


def better(one: Sequences, other: Sequences) -> Sequences:
    """Return per problem the better of two single candidates; of equal ones the first."""
    wins = other.values > one.values
    return Sequences(torch.where(wins[..., None, None], other.actions, one.actions), torch.where(wins, other.values, one.values))


def moments(found: Sequences, temperature: float) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, ``[N, H, A]``, of candidates weighted by ``softmax(temperature * value)``.

    Candidates of value -inf have no weight; if a problem has no others, both results are NaN.
    """
    gaps = temperature * (found.values - found.values.amax(1, keepdim=True))
    weights = gaps.masked_fill(found.values == -torch.inf, -torch.inf).softmax(1)[..., None, None]
    mean = (weights * found.actions).sum(1)
    return mean, (weights * (found.actions - mean.unsqueeze(1)).square()).sum(1).sqrt()
