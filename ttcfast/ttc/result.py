"""What a rollout gives back beside the trajectory: every choice, and every time a guardrail stepped in."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ttcfast.spec import StochasticConfig


@dataclass(frozen=True)
class StepOutput:
    """One step of ``N`` problems; ``B`` candidates each.

    Where candidates are refined, B counts the moved copies in: position p is a copy of candidate ``p % branching_factor``, unmoved below
    ``branching_factor``.

    Attributes:
        step: index t of the state that was left.
        state: the state at t + 1, in the layout of ``x0`` (without its history).
        scores: float64 ``[N, B]``, -inf for a candidate that could not be used. Where the group was drawn again, those of
            the round with the best candidate.
        chosen: int64 ``[N]``, position of the chosen candidate in its group, 0 being the deterministic step where it is included;
            -1 where the state is none of them: a fallback outside the group, a combination of candidates, a frozen problem.
        fallback: bool ``[N]``, no candidate was usable or none reached ``score_floor``, so that the deterministic step (a foreign model:
            one fresh sample) was taken; counted also where that was not finite and the best candidate below the floor was kept (``chosen``
            is its position then).
        resamples: int64 ``[N]``, how often the group was drawn again, for want of a usable candidate or of one above ``score_floor``.
        nonfinite: int64 ``[N]``, candidates rejected for NaN, infinity or a score that is neither; also refined copies that lost a positive
            density or pressure.
        distinct: int64 ``[N]``, candidates (of all beams) that differ from each other by more than rounding, before they are refined and
            before any are drawn again; 0 where none were drawn.
        collapsed: bool ``[N]``, candidate 0 was taken because the scores' spread fell below ``min_score_spread``, or because no more than
            rounding (``Scorer.spread_floor``) lies between the best score and its own.
        unprojected: bool ``[N]``, the projection would have made a density or pressure negative, so that the raw state was kept.
        frozen: bool ``[N]``, no candidate was usable and the fallback was not finite either: NaN from here on.
        nfe: model evaluations of this step, over all problems; one evaluation is one state through the model.
        reward_evaluations: scores and ascents of this step, over all problems and candidates.
        weights: float64 ``[N, B]``, what was combined: the share of every candidate in the state, which add up to 1 (negative ones too with
            ``select="span"``); 0 where the state is none of them. None where no candidates are combined (``select="argmax"``).
    """

    step: int
    state: Tensor
    scores: Tensor
    chosen: Tensor
    fallback: Tensor
    resamples: Tensor
    nonfinite: Tensor
    distinct: Tensor
    collapsed: Tensor
    unprojected: Tensor
    frozen: Tensor
    nfe: int
    reward_evaluations: int = 0
    weights: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class BeamStepOutput(StepOutput):
    """One step of a search over k beams. ``state`` is the state of each problem's best beam so far, which later steps may abandon;
    ``chosen`` and ``collapsed`` are that beam's, ``unprojected`` too; ``nonfinite`` counts the candidates of all beams. ``scores`` are the
    step's scores of the beams kept.

    Attributes:
        scores, paths: float64 ``[N, k]``, of each beam kept, its score in this step and over its path (``score_aggregation``); -inf where
            there are fewer beams, and a score of -inf where the deterministic step was taken without one.
        parents, positions: int64 ``[N, k]``, the beam that each comes from and its candidate's position there; -1 where there is none.
        copies: states copied: into the slots of the best k, and from there to the next step.
        searched: whether candidates were drawn; False behind the end of a budget.
    """

    paths: Tensor
    parents: Tensor
    positions: Tensor
    copies: int
    searched: bool = True


@dataclass(frozen=True)
class RolloutResult:
    """A rollout of ``N`` problems (1 for a single state) over ``T`` steps.

    Attributes:
        trajectory: ``[N, T+1, C, *S]``, or ``[C, T+1, *S]`` for a single state; frame 0 is ``x0``.
        scores: float64 ``[N, T, B]``.
        chosen: int64 ``[N, T]``.
        weights: float64 ``[N, T, B]``, or None where none are combined.
        fallbacks, collapsed, unprojected, frozen: bool ``[N, T]``.
        resamples, nonfinite, distinct: int64 ``[N, T]``.
        nfe: model evaluations in total.
        reward_evaluations: of the scorer: one is one candidate scored, or one direction found to move it in.
        seconds: wall-clock time.
        stochastic: the noise in force, the config's or else the surrogate's own; None where the deterministic step was the only
            candidate, and for a foreign model, whose noise is its own affair.
        copies: state copies of a search over several beams; None for others.
        peak_bytes: the most memory held: on a GPU by this rollout's tensors, on a CPU by the process since it began. None where that was
            not asked or is not known.
        beams: every step of a search over several beams, their states left out; () for others.
        searched: steps that drew candidates; fewer than T where a budget ended. None for other rollouts.

    The columns are those of ``StepOutput``; a search over several beams gives them along the best path, and ``scores`` ``[N, T, k]`` of the
    beams kept.
    """

    trajectory: Tensor
    scores: Tensor
    chosen: Tensor
    fallbacks: Tensor
    resamples: Tensor
    nfe: int
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

    def interventions(self) -> dict[str, int]:
        """How often each guardrail stepped in, over all problems and steps."""
        names = ("fallbacks", "resamples", "nonfinite", "collapsed", "unprojected", "frozen")
        return {name: int(getattr(self, name).sum()) for name in names}
