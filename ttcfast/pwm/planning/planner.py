"""Acts in environments by planning: at every step a new plan, of which the first action is taken."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from ttcfast.runtime.errors import ArgumentError

from .imagined import Function, LatentModel
from .plan import Plan, search
from .settings import PlanSettings


class Planner:
    """Receding-horizon control of n environments at once; every plan starts from the one before, shifted by a step.

    Args:
        model, policy, value, task, seed: As for :func:`ttcfast.pwm.planning.plan`.
        settings: Fields of :class:`PlanSettings`, ``horizon`` and ``samples`` among them.

    Attributes:
        settings: The :class:`PlanSettings`.
        last: The latest plan.
        actions: Number of actions planned so far, n per call.
        evaluations: Model steps made for them.
        seconds: Time spent on them; on a GPU each call waits until its plan is made.

    Raises:
        ArgumentError: A setting is out of range.

    Example::

        planner = Planner(model, horizon=16, samples=512, policy=policy, value=critic)
        planner.reset(n)
        while not done:
            action = planner.act(model.encode(obs))  # [n, A]
    """

    def __init__(
        self,
        model: LatentModel,
        *,
        policy: Function | None = None,
        value: Function | None = None,
        task: Any = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.model, self.settings = model, PlanSettings(**settings)
        self._given = {"policy": policy, "value": value, "task": task, "seed": seed}
        self.actions, self.evaluations, self.seconds = 0, 0, 0.0
        self._fallbacks = torch.zeros((), dtype=torch.int64)
        self.reset(0)

    def reset(self, n: int) -> None:
        """Begin episodes in n environments: forget the plans and count steps from 0; times and counts go on."""
        self.n, self.step = n, 0
        self.last: Plan | None = None
        self._warm: Tensor | None = None

    def forget(self, ended: Tensor) -> None:
        """Forget the plans of the environments whose episode has ended, bool ``[n]``, while the others go on.

        Raises:
            ArgumentError: The shape or dtype is another one.
        """
        if ended.shape != (self.n,) or ended.dtype != torch.bool:
            raise ArgumentError(f"ended is {ended.dtype} {tuple(ended.shape)}; give bool [{self.n}], one per environment")
        if self._warm is not None:
            self._warm = self._warm.masked_fill(ended.to(self._warm.device)[:, None, None], torch.nan)

    def act(self, z: Tensor) -> Tensor:
        """Return actions ``[n, A]`` for latent states ``[n, latent_dim]``.

        Raises:
            ArgumentError: There are not as many states as :meth:`reset` was told, or as for :func:`plan`.
        """
        if len(z) != self.n:
            raise ArgumentError(f"z has {len(z)} rows and the planner was reset for {self.n} environments; call reset({len(z)}) first")
        begun = time.perf_counter()
        found = search(self.model, z, self.settings, warm=self._warm, step=self.step, **self._given)
        if z.is_cuda:
            torch.cuda.synchronize(z.device)
        self.seconds += time.perf_counter() - begun
        self.actions += self.n
        self.evaluations += found.evaluations
        self._fallbacks = self._fallbacks.to(z.device) + found.fallback.sum()
        self.last, self.step = found, self.step + 1
        self._warm = torch.cat([found.actions[:, 1:], torch.full_like(found.actions[:, :1], torch.nan)], 1)
        return found.actions[:, 0]

    @property
    def fallbacks(self) -> int:
        """Number of actions for which no candidate had a finite value."""
        return int(self._fallbacks)
