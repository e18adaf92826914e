"""The loss in score that a cheaper way of computing the candidates causes through its choices."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttcfast.spec import TTCConfig
from ttcfast.ttc.inference import TTCGreedy

MOST_RELATIVE_REGRET = 0.05  # docs/design/decisions.md ("Precision")


@dataclass(frozen=True)
class ChoiceRegret:
    """Loss of a cheaper path's choices, measured by the scores of the reference, for each state ``[N, T]``.

    Args:
        regret: Reference score of the reference's choice minus that of the cheaper path's choice, at least 0. Infinite where the reference
            rejects the cheaper path's choice; NaN where either had no usable candidate.
        spread: Largest minus smallest usable score of the reference's group.
        agree: Whether both chose the same candidate.
    """

    regret: Tensor
    spread: Tensor
    agree: Tensor

    @property
    def relative(self) -> Tensor:
        """``regret / spread``, 0 where nothing is lost."""
        return torch.where(self.regret == 0, 0.0, self.regret / self.spread)

    @property
    def worst(self) -> float:
        """Largest relative regret over all comparable states; NaN if there are none."""
        compared = self.relative[~self.relative.isnan()]
        return float(compared.max()) if compared.numel() else float("nan")

    @property
    def mean(self) -> float:
        """Mean relative regret over all comparable states."""
        return float(self.relative.nanmean())

    def __str__(self) -> str:
        same, groups = float(self.agree.double().mean()), self.agree.numel()
        return f"same choice in {same:.1%} of {groups} groups; regret {self.mean:.3%} of the spread on average, {self.worst:.3%} at worst"


def choice_regret(
    reference: Any, cheaper: Any, scorer: Any, states: Tensor, cfg: TTCConfig | None = None, *, problem_ids: Tensor | None = None
) -> ChoiceRegret:
    """Compare the choices of two ways of computing the same candidates, teacher-forced: on the same states and with the same keys.

    Both start from every given state, so that differences do not accumulate along a trajectory. Nothing is resampled. A cheaper path is
    acceptable if its regret is at most ``MOST_RELATIVE_REGRET`` times the spread.

    Args:
        reference: A ``Surrogate`` in float32, not compiled.
        cheaper: A ``Surrogate`` of the same model with a lower ``dtype``, ``compile`` or another economy.
        scorer: As for ``TTCGreedy``.
        states: ``[N, T, C, *S]``, finite states of a trajectory before each of T steps, with history h ``[N, T, h, C, *S]``.
        cfg: As for ``TTCGreedy``; None takes the defaults.
        problem_ids: int64 ``[N]``, as in ``TTCGreedy.rollout``.

    Source: docs/design/decisions.md ("Precision").
    """
    cfg = dataclasses.replace(TTCConfig() if cfg is None else cfg, max_resample=0, score_floor=None)
    if cfg.select != "argmax":
        raise ValueError(f"select is {cfg.select!r}; choices can be compared with select='argmax' only")
    ours, theirs = TTCGreedy(reference, scorer, cfg), TTCGreedy(cheaper, scorer, cfg)
    steps = [_compared(ours, theirs, states[:, t], t, problem_ids) for t in range(states.shape[1])]
    return ChoiceRegret(*(torch.stack(values, 1) for values in zip(*steps)))


def _compared(ours: TTCGreedy, theirs: TTCGreedy, x: Tensor, step: int, problem_ids: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    a = ours.step_from(x, step=step, problem_ids=problem_ids)
    b = theirs.step_from(x, step=step, problem_ids=problem_ids)
    usable = a.scores.isfinite()
    spread = torch.where(usable, a.scores, -torch.inf).amax(1) - torch.where(usable, a.scores, torch.inf).amin(1)
    chosen = [out.chosen.clamp_min(0).unsqueeze(1) for out in (a, b)]
    # below 0 only where the reference's scores had collapsed, so that it took candidate 0 in spite of them
    regret = (a.scores.gather(1, chosen[0]) - a.scores.gather(1, chosen[1])).squeeze(1).clamp_min(0)
    lost = a.fallback | b.fallback
    return torch.where(lost, torch.nan, regret), torch.where(lost, torch.nan, spread), (a.chosen == b.chosen) & ~lost
