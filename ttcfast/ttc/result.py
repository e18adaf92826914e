"""Defines the results of steps and rollouts: every choice, and every intervention of a guardrail."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ttcfast.spec import StochasticConfig


@dataclass(frozen=True, repr=False)
class StepOutput:
    """One step of ``N`` problems with ``B`` candidates each.

    With refinement, B includes the moved copies: position p is a copy of candidate ``p % branching_factor``, and positions below
    ``branching_factor`` are the candidates themselves.

    Attributes:
        step: Index t of the state being left.
        state: State at t + 1, in the layout of ``x0`` without its history.
        scores: float64 ``[N, B]``, -inf for a candidate that cannot be used. For a group that was drawn again, the scores of the round with
            the best candidate.
        chosen: int64 ``[N]``, position of the chosen candidate; 0 is the deterministic step where that is included. -1 for a state that is
            no candidate: a fallback outside the group, a combination of candidates, a frozen problem.
        fallbacks: bool ``[N]``, no candidate was usable, or none reached ``score_floor``, so the deterministic step was taken (one fresh
            sample of a model that has none). Also counted where that step is not finite and the best candidate below the floor is kept;
            ``chosen`` is then its position.
        resamples: int64 ``[N]``, number of times the group was drawn again.
        nonfinite: int64 ``[N]``, candidates rejected because their values or their score are not finite, including refined copies that lost
            a positive density or pressure.
        distinct: int64 ``[N]``, candidates of all beams that differ by more than rounding, before refinement and resampling; 0 where none
            were drawn.
        collapsed: bool ``[N]``, candidate 0 was taken because the spread of the scores is below ``min_score_spread``, or because the best
            score differs from candidate 0's by no more than rounding (``Scorer.spread_floor``).
        unprojected: bool ``[N]``, the raw state was kept because projecting it would make a density or pressure negative.
        frozen: bool ``[N]``, neither a candidate nor the fallback is finite; the problem is NaN from here on.
        evaluations: Model evaluations of this step over all problems; one evaluation is one state through the model.
        reward_evaluations: Scores and ascents of this step over all problems and candidates.
        solver_steps: Steps of classical solvers among the candidates, over all problems (``ttcfast.models.ensemble``).
        weights: float64 ``[N, B]``, share of each candidate in a combined state. Shares add up to 1 (some are negative with
            ``select="span"``), or are all 0 where the state is no combination. None where candidates are not combined.
        searched: Whether candidates were drawn; False beyond the end of a budget.
    """

    step: int
    state: Tensor
    scores: Tensor
    chosen: Tensor
    fallbacks: Tensor
    resamples: Tensor
    nonfinite: Tensor
    distinct: Tensor
    collapsed: Tensor
    unprojected: Tensor
    frozen: Tensor
    evaluations: int
    reward_evaluations: int = 0
    weights: Tensor | None = None
    searched: bool = True
    solver_steps: int = 0

    @property
    def nfe(self) -> int:
        """The same as ``evaluations``."""
        return self.evaluations

    @property
    def fallback(self) -> Tensor:
        """The same as ``fallbacks``."""
        return self.fallbacks

    def __repr__(self) -> str:
        counts = f"{len(self.chosen)} problems, step {self.step}, {self.evaluations} evaluations, {int(self.fallbacks.sum())} fallbacks"
        return f"{type(self).__name__}({counts})"


@dataclass(frozen=True, kw_only=True, repr=False)
class BeamStepOutput(StepOutput):
    """One step of a search over k beams.

    ``state``, ``chosen``, ``collapsed`` and ``unprojected`` are those of each problem's best beam so far, which later steps may abandon.
    ``nonfinite`` counts the candidates of all beams.

    Attributes:
        scores, paths: float64 ``[N, k]``, score of each beam in this step and over its path (``score_aggregation``). Both are -inf where
            there are fewer beams; a beam that took the deterministic step without a score has a score of -inf.
        parents, positions: int64 ``[N, k]``, beam that each comes from, and position of its candidate there; -1 where there is none.
        copies: Number of states copied, into the slots of the best k and from there to the next step.
    """

    paths: Tensor
    parents: Tensor
    positions: Tensor
    copies: int


@dataclass(frozen=True, repr=False)
class RolloutResult:
    """A rollout of ``N`` problems (1 for a single state) over ``T`` steps.

    The columns are those of ``StepOutput``. A search over several beams reports them along the best path.

    Attributes:
        trajectory: ``[N, T+1, C, *S]``, or ``[C, T+1, *S]`` for a single state; frame 0 is ``x0``.
        scores: float64 ``[N, T, B]``, or ``[N, T, k]`` of the beams kept.
        chosen: int64 ``[N, T]``.
        weights: float64 ``[N, T, B]``, or None where candidates are not combined.
        fallbacks, collapsed, unprojected, frozen: bool ``[N, T]``.
        resamples, nonfinite, distinct: int64 ``[N, T]``.
        evaluations: Model evaluations in total; ``nfe`` is the same number.
        seconds: Wall-clock time.
        stochastic: Noise in force: the configuration's, else the surrogate's own. None where the deterministic step is the only candidate,
            and for a foreign model, which draws in its own way.
        copies: Number of states copied by a search over several beams; None for other searches.
        peak_bytes: Most memory held during this rollout: on a GPU by tensors, on a CPU by the whole process, program and data included, and
            the most of any rank. None where the system cannot restart its count, as on a CPU without Linux.
        beams: Every step of a search over several beams, without its states; empty for other searches.
        searched: Number of steps that drew candidates, below T where a budget ended.
        reward_evaluations: Candidates scored and directions found to move them in.
        solver_steps: Steps of classical solvers.
        chunk_size: Most candidates made at once, set or measured (``TTCConfig.chunk_size``); None for all of a step.
    """

    trajectory: Tensor
    scores: Tensor
    chosen: Tensor
    fallbacks: Tensor
    resamples: Tensor
    evaluations: int
    seconds: float
    nonfinite: Tensor
    distinct: Tensor
    collapsed: Tensor
    unprojected: Tensor
    frozen: Tensor
    stochastic: StochasticConfig | None = None
    copies: int | None = None
    peak_bytes: int | None = None
    beams: tuple[BeamStepOutput, ...] = ()
    searched: int | None = None
    reward_evaluations: int = 0
    weights: Tensor | None = None
    solver_steps: int = 0
    chunk_size: int | None = None

    @property
    def nfe(self) -> int:
        """The same as ``evaluations``."""
        return self.evaluations

    def interventions(self) -> dict[str, int]:
        """Number of times each guardrail stepped in, over all problems and steps."""
        names = ("fallbacks", "resamples", "nonfinite", "collapsed", "unprojected", "frozen")
        return {name: int(getattr(self, name).sum()) for name in names}

    def __repr__(self) -> str:
        problems, steps = self.chosen.shape
        counts = f"{problems} problems, {steps} steps, {self.evaluations} evaluations, {int(self.fallbacks.sum())} fallbacks"
        return f"RolloutResult({counts}, {self.seconds:.2g} s)"
