"""How much a cheaper way of computing the candidates costs in the choices that it makes."""

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
    """What the choices of a cheaper path lose by the scores of the reference, state by state ``[N, T]``.

    Args:
        regret: score of the reference's choice less that of the cheaper path's choice, both as the reference scores them, at least 0.
            Infinite where the reference rejects what the cheaper path chose; NaN where either had no usable candidate.
        spread: largest less smallest usable score of the reference's group.
        agree: whether both chose the same candidate.
    """

    regret: Tensor
    spread: Tensor
    agree: Tensor

    @property
    def relative(self) -> Tensor:
        """``regret / spread``; 0 where nothing is lost, whatever the spread."""
        return torch.where(self.regret == 0, 0.0, self.regret / self.spread)

    @property
    def worst(self) -> float:
        """The largest relative regret of all states that could be compared; NaN where none could."""
        compared = self.relative[~self.relative.isnan()]
        return float(compared.max()) if compared.numel() else float("nan")

    @property
    def mean(self) -> float:
        """The mean relative regret of all states that could be compared."""
        return float(self.relative.nanmean())

    def __str__(self) -> str:
        same, groups = float(self.agree.double().mean()), self.agree.numel()
        return f"same choice in {same:.1%} of {groups} groups; regret {self.mean:.3%} of the spread on average, {self.worst:.3%} at worst"


def choice_regret(
    reference: Any, cheaper: Any, scorer: Any, states: Tensor, cfg: TTCConfig | None = None, *, problem_ids: Tensor | None = None
) -> ChoiceRegret:
    """Compare the choices of two ways of computing the same candidates, teacher-forced: on the same states and with the same keys.

    Both start from every given state, so that differences do not add up along a trajectory. Nothing is drawn again. Asked of a cheaper
    path is a regret of at most ``MOST_RELATIVE_REGRET`` times the spread.

    Args:
        reference: a ``Surrogate``, in float32 and not compiled.
        cheaper: a ``Surrogate`` of the same model with ``dtype``, ``compile`` or what else makes it cheaper.
        scorer: as for ``TTCGreedy``.
        states: ``[N, T, C, *S]``, the states before each of T steps (``[N, T, h, C, *S]`` with history h), finite: those of a trajectory.
        cfg: as for ``TTCGreedy``; None takes the defaults.
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
