"""Scores candidates by their true error: the upper bound of any choice among given candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from ttcfast.spec import StateSpec
from ttcfast.transfer import sent

from .scorer import ScoreContext, Scorer


class OracleScorer(Scorer):
    """Minus the mean squared error to the true next state, ``-mean(((cand - truth) / scale)^2)`` over cells and predicted channels.

    It is greedy on the truth of each step, so that it bounds step-by-step choices, not the whole rollout.

    Args:
        truth: True trajectories ``[N_all, T+1, C, *S]``, indexed by the context's problem ids and step.
        scale: A number, or one per channel ``[C]``; None means 1.
        spec: Layout of the states, whose given channels are no candidate's error; None counts all channels.

    Raises:
        ValueError: The truth has other axes than a trajectory, or the scale has another length or is not positive.

    Source: docs/design/decisions.md ("Honest baselines").
    """

    marks_nonfinite = True
    scores_projected = True
    maximum = 0.0
    ascent_to_best = True
    truth: Tensor
    scale: Tensor

    def __init__(self, truth: Tensor, *, scale: float | Tensor | None = None, spec: StateSpec | None = None) -> None:
        super().__init__()
        self.spec = spec
        if not 4 <= truth.ndim <= 6:
            raise ValueError(f"truth has shape {tuple(truth.shape)}; expected trajectories [N, T+1, C, *S]")
        self.ndim = truth.ndim - 3
        s = torch.as_tensor(1.0 if scale is None else scale, dtype=truth.dtype, device=truth.device).flatten()
        if s.numel() not in (1, truth.shape[2]) or not bool((s > 0).all()):
            raise ValueError(f"scale is {s.tolist()}; give a positive number, or one for each of the {truth.shape[2]} channels")
        self.register_buffer("truth", truth, persistent=False)
        self.register_buffer("scale", s.reshape(-1, *[1] * self.ndim), persistent=False)

    def score_group(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        error = (candidates - self._target(state, candidates, context)) / self.scale.to(candidates)
        if self.spec is not None:
            error = self.spec.predicted(error, channel_axis=2)
        return -error.square().flatten(2).mean(2)

    def ascent(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        """Returns the displacement to the truth, 0 in given channels."""
        target = self._target(state, candidates, context).expand_as(candidates)
        return (target if self.spec is None else self.spec.carried(target, candidates, channel_axis=2)) - candidates

    def units(self, state: Tensor) -> Tensor:
        return self.scale.to(state)

    def _target(self, state: Tensor, candidates: Tensor, context: ScoreContext | None) -> Tensor:
        """The true next states ``[N, 1, C, *S]``."""
        if context is None:
            raise ValueError("context is None; the oracle needs ScoreContext(step, problem_ids) to find the true next state")
        if not 0 <= context.step + 1 < self.truth.shape[1]:
            raise ValueError(
                f"step {context.step} leads to frame {context.step + 1} and the truth has frames 0 to {self.truth.shape[1] - 1}; "
                f"roll out at most {self.truth.shape[1] - 1} steps"
            )
        known = context.on_host
        if known.numel() != state.shape[0] or bool(((known < 0) | (known >= self.truth.shape[0])).any()):
            raise ValueError(f"problem_ids are {known.tolist()} for {state.shape[0]} states; give one id each, below {self.truth.shape[0]}")
        ids = sent(context.problem_ids, self.truth.device)
        return self.truth[ids, context.step + 1].to(candidates).unsqueeze(1)
