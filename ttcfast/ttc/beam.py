"""Searches over several beams: every step keeps the k best partial rollouts of each problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ttcfast.rewards.scorer import as_scorer
from ttcfast.spec import TTCConfig

from .search import Search

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from .budget import Budget
    from .result import BeamStepOutput

__all__ = ["TTCBeam"]


class TTCBeam(Search):
    """Rolls a surrogate out keeping the k best partial rollouts of each problem, and returns the best.

    At each step every beam draws B candidates, and the k best of a problem's k B go on by the score of their path. Candidates come in
    chunks and only survivors are copied, so that memory does not grow with B. No two beams share noise: the candidates of beam j (beams are
    numbered from the best) have ids j B to (j + 1) B - 1. With one beam, no lookahead and another approach than ``"particle"`` the rollout
    is ``TTCGreedy``'s, bit for bit.

    ``cfg.score_aggregation`` is the score of a path: ``"sum"``, ``"mean"``, ``"last"`` (of the last step), or ``"discounted"``,
    ``cfg.discount * path + score``, where older scores count less, between ``"last"`` (0) and ``"sum"`` (1).

    ``cfg.approach`` is one of

    * ``"beam"``: as above.
    * ``"greedy"``: one beam.
    * ``"diverse_beam"``: the k best of the first step root subtrees, each of which keeps its own best candidate. Experimental: no
      measurement shows a gain over ``"beam"``.
    * ``"particle"``: k copies of the start; at each step k of the k B candidates are drawn by systematic resampling with weights
      ``exp(score / cfg.temperature)`` of the step's score, the same candidate perhaps several times. Random numbers are keyed by random
      seed, step and problem. All scores of a step are kept (16 bytes per candidate), and where candidates come in chunks the k drawn are
      generated once more. Experimental: no measurement shows a gain over ``"beam"``.

    ``cfg.lookahead`` L ranks a candidate by its path prolonged by L deterministic steps (fewer at the end), which cost L evaluations per
    candidate; the path's own score has no part of them. A candidate whose continuation is not finite cannot be taken. Experimental: no
    measurement shows a gain at equal cost.

    Guardrails are ``TTCGreedy``'s for each problem: a beam without a usable candidate is dropped while others of its problem have some; a
    problem without any (or none that reaches ``cfg.score_floor``) is drawn again, and then each of its beams takes the deterministic step
    and keeps its path's score. Where the scores of a beam have no spread, its only survivor is candidate 0.

    Args:
        fm, scorer: As for ``TTCGreedy``.
        cfg: See ``TTCConfig``; ``beam_width`` is k.
        tie_breaker: A scorer (or callable) whose value, larger first, decides between candidates of equal rank before the smaller id does.
            Particles are drawn, not ranked, and have none.
        drop_duplicates: Keep only the best of a problem's candidates that are equal in every bit. Not for particles, which may be drawn
            several times.

    Raises:
        ValueError: More beams than candidates of the first step, or an option that does not go with the approach; otherwise as
            ``TTCGreedy``.

    Source: TTC plan, "Optional: Beam Search"; docs/design/decisions.md ("Search beside correctors").
    """

    def __init__(
        self, fm: Any, scorer: Any, cfg: TTCConfig | None = None, *, tie_breaker: Any = None, drop_duplicates: bool = False
    ) -> None:
        cfg = TTCConfig() if cfg is None else cfg
        check_beam(cfg)
        super().__init__(fm, scorer, cfg)
        if cfg.lookahead and self.scorer.needs_group:
            raise ValueError(
                f"lookahead is {cfg.lookahead} and {type(self.scorer).__name__} compares the candidates of a step, which a "
                "continuation has one of; use lookahead=0, or a scorer that looks at each by itself"
            )
        if cfg.approach == "particle" and tie_breaker is not None:
            raise ValueError(
                f"tie_breaker is a {type(tie_breaker).__name__} and approach 'particle' draws candidates by weight, so that no rank is "
                "tied; use tie_breaker=None, or approach='beam' or 'diverse_beam'"
            )
        if cfg.approach == "particle" and drop_duplicates:
            raise ValueError(
                "drop_duplicates is True and approach 'particle' draws good candidates several times; use drop_duplicates=False, or "
                "approach='beam' or 'diverse_beam'"
            )
        self.tie_breaker = None if tie_breaker is None else as_scorer(tie_breaker, ndim=self._source.ndim)
        self.drop_duplicates = drop_duplicates

    if TYPE_CHECKING:  # the same steps, with messages that mention beams

        def rollout_iter(
            self, x0: Tensor, T: int, *, problem_ids: Tensor | None = None, budget: Budget | None = None
        ) -> Iterator[BeamStepOutput]: ...

        def step_from(self, x: Tensor, *, step: int, problem_ids: Tensor | None = None) -> BeamStepOutput: ...


def check_beam(cfg: TTCConfig) -> None:
    """Raise ``ValueError`` for options that contradict each other, rather than ignore one."""
    if not isinstance(cfg, TTCConfig):
        raise ValueError(f"cfg is a {type(cfg).__name__}; give a TTCConfig")
    k, b = cfg.beam_width, cfg.branching_factor
    if cfg.approach == "greedy" and k > 1:
        raise ValueError(
            f"beam_width is {k} and approach 'greedy', which keeps one beam; use approach='beam', 'diverse_beam' or 'particle'"
        )
    if cfg.approach in ("beam", "diverse_beam") and k > b:
        raise ValueError(
            f"beam_width is {k} and the first step, which leaves a single state, has branching_factor={b} candidates; "
            "use a beam_width of at most that, or approach='particle'"
        )
    check_select(cfg)
    if cfg.approach == "particle" and cfg.shard == "candidates":
        raise ValueError("shard is 'candidates' and approach 'particle' weighs all candidates of a step at once; use shard='problems'")
    if cfg.approach != "particle" and cfg.temperature != 1.0:
        raise ValueError(
            f"temperature is {cfg.temperature} and approach {cfg.approach!r} does not sample by score; use approach='particle'"
        )


def check_select(cfg: TTCConfig) -> None:
    """Raise ``ValueError`` for a combination of candidates."""
    if cfg.select != "argmax":
        raise ValueError(f"select is {cfg.select!r}, a combination of candidates, of which a beam has no score; use select='argmax'")
