"""Search over several beams at test time: at every step keep the k best partial rollouts of each problem."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import warnings
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ttcfast.rewards.common import ScoreContext, Scorer, as_scorer
from ttcfast.spec import TTCConfig

from . import guardrails
from .beam_run import BeamRun, collected, without_state
from .budget import Budget
from .chunks import Chunks
from .inference import TTCGreedy
from .memory import reset_peak
from .particles import ParticleSearch, uniforms_of
from .pool import marks_of
from .result import BeamStepOutput, RolloutResult
from .sources import probe
from .streaming import Beams, StepSearch, Survivors, joined, usable_scores

__all__ = ["TTCBeam"]

logger = logging.getLogger(__name__)


class TTCBeam(TTCGreedy):
    """Rolls a surrogate out keeping the k best partial rollouts of each problem, and returns the best.

    At each step every beam draws B candidates; of the k B of a problem the k best by the score of their path go on. Candidates come in
    chunks and only survivors are copied, so that memory does not grow with B (``ttcfast.ttc.streaming``). No two beams share noise: the
    candidates of beam j (beams are numbered from the best) have ids j B to (j + 1) B - 1. With one beam the rollout is ``TTCGreedy``'s.

    The score of a path, ``cfg.score_aggregation``: ``"sum"``, ``"mean"``, ``"last"`` (of the last step), or ``"discounted"``,
    ``cfg.discount * path + score``, where older scores count less, between ``"last"`` (0) and ``"sum"`` (1).

    ``cfg.approach``:

    * ``"beam"``: as above.
    * ``"diverse_beam"``: the k best of the first step root subtrees; from then on each keeps its own best candidate.
    * ``"particle"``: k copies of the start; at each step k of the k B candidates are drawn by systematic resampling with weights
      ``exp(score / cfg.temperature)`` of the step's score, the same candidate perhaps several times. Random numbers are keyed by seed, step
      and problem. Weights need all scores of a step: they are kept (8 bytes each), and where candidates come in chunks the k drawn are
      generated once more.
    * ``"greedy"``: one beam.

    ``cfg.lookahead`` L: a candidate is ranked by its path prolonged by L deterministic steps (fewer at the end), which cost L evaluations
    more for each candidate; the path's own score has no part of them. A candidate whose continuation is not finite cannot be taken.

    Guardrails are ``TTCGreedy``'s, problem by problem: a beam without a usable candidate is dropped while others of its problem have some;
    a problem without any (or none that reaches ``cfg.score_floor``) is drawn again, and then each of its beams takes the deterministic step
    with its path's score as it was; where the scores of a beam have no spread its only survivor is candidate 0.

    Args:
        fm, scorer: as for ``TTCGreedy``.
        cfg: see ``TTCConfig``; ``beam_width`` is k.
        tie_breaker: a scorer (or callable) whose value, larger first, decides between candidates of equal rank before the smaller id does.
        drop_duplicates: of candidates of a problem that are equal in every bit only the best is kept.

    Raises:
        ValueError: more beams than candidates of the first step, an option that does not go with the approach, else as ``TTCGreedy``.

    Source: seeds/ttc-integration-plan.md section 12.
    """

    def __init__(
        self, fm: Any, scorer: Any, cfg: TTCConfig | None = None, *, tie_breaker: Any = None, drop_duplicates: bool = False
    ) -> None:
        super().__init__(fm, scorer, cfg)
        if self.cfg.lookahead and self.scorer.needs_group:
            raise ValueError(
                f"lookahead is {self.cfg.lookahead} and {type(self.scorer).__name__} compares the candidates of a step, which a "
                "continuation has one of; use lookahead=0, or a scorer that looks at each by itself"
            )
        self.tie_breaker: Scorer | None = None if tie_breaker is None else as_scorer(tie_breaker, ndim=self._source.ndim)
        self.drop_duplicates = drop_duplicates

    @staticmethod
    def _check(cfg: TTCConfig) -> None:
        check_beam(cfg)

    @overload
    def rollout(
        self,
        x0: Tensor,
        T: int,
        *,
        return_info: Literal[False] = False,
        problem_ids: Tensor | None = None,
        budget: Budget | None = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> Tensor: ...

    @overload
    def rollout(
        self,
        x0: Tensor,
        T: int,
        *,
        return_info: Literal[True],
        problem_ids: Tensor | None = None,
        budget: Budget | None = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> RolloutResult: ...

    def rollout(
        self,
        x0: Tensor,
        T: int,
        *,
        return_info: bool = False,
        problem_ids: Tensor | None = None,
        budget: Budget | None = None,
        resume: str | os.PathLike[str] | None = None,
    ) -> Tensor | RolloutResult:
        """Roll out ``T`` steps from ``x0`` and follow the best path back. As ``TTCGreedy.rollout``, and:

        Args:
            budget: when to stop searching.
            resume: a folder; the state of the search is kept there after every step, and a rollout that was killed goes on from it.

        Returns:
            The trajectory of each problem's path with the highest score, shorter than T + 1 frames where a budget ended with ``"end"``.

        Raises:
            ValueError: besides, a budget too small for the deterministic rollout.
            CheckpointError: the folder holds another rollout; the keys that differ are named.
        """
        x, single = self._start(x0, T)
        reset_peak(x.device)
        run = self._begin(x, T, self._problem_ids(problem_ids, x), budget, resume)
        for _ in self._iterate_run(run, resume):
            pass
        result = collected(run, self._latest(x), single, self._source.stochastic if self._stochastic else None)
        logger.info("rollout of %d steps: %d model evaluations in %.2f s, %s", T, result.nfe, result.seconds, result.interventions())
        return result if return_info else result.trajectory

    def rollout_iter(  # type: ignore[override]
        self, x0: Tensor, T: int, *, problem_ids: Tensor | None = None, budget: Budget | None = None
    ) -> Iterator[BeamStepOutput]:
        """The same search step by step, holding no past but what the beams are. ``state`` is that of the best beam at each step, so the
        states are a path of the tree only where one beam stays the best. Arguments and errors as ``rollout``."""
        x, single = self._start(x0, T)
        run = self._begin(x, T, self._problem_ids(problem_ids, x), budget, None)
        run.history = None
        for out in self._iterate_run(run, None):
            yield dataclasses.replace(out, state=out.state[0]) if single else out

    @torch.no_grad()
    def step_from(self, x: Tensor, *, step: int, problem_ids: Tensor | None = None) -> BeamStepOutput:
        """One step from any states, each the only beam of its problem, as in ``TTCGreedy.step_from``."""
        run = self._begin(self._start(x, 1)[0], step + 1, self._problem_ids(problem_ids, x), None, None)
        run.history, run.step = None, step
        return self._advance(run)

    def _begin(self, x: Tensor, T: int, ids: Tensor, budget: Budget | None, resume: str | os.PathLike[str] | None) -> BeamRun:
        cfg, n = self.cfg, len(x)
        logger.info("%s: %d problems, T=%d, %s", type(self).__name__, n, T, cfg)
        self._log_noise()
        if budget is not None:
            budget.check(n, T)
        copies = cfg.beam_width if cfg.approach == "particle" else 1
        problem = torch.arange(n, device=x.device).repeat_interleave(copies)
        run = BeamRun(x[problem], problem, torch.arange(copies, device=x.device).repeat(n), ids, T, cfg.beam_width, budget)
        run.chunks = (self._chunks(x, ids, rows=len(problem)), self._chunks(x, ids, rows=n * cfg.beam_width))
        return run

    @torch.no_grad()
    def _iterate_run(self, run: BeamRun, resume: str | os.PathLike[str] | None) -> Iterator[BeamStepOutput]:
        while run.step < run.T:
            began = time.perf_counter()
            out = self._advance(run)
            if out is None:
                return
            if run.window.is_cuda:
                torch.cuda.synchronize(run.window.device)
            run.seconds += time.perf_counter() - began
            run.outputs.append(without_state(out))
            yield out

    def _advance(self, run: BeamRun) -> BeamStepOutput | None:
        """One step of the problems that are still going; None where the budget ends the rollout."""
        if not len(run.problem):
            return run.idle(self._latest(run.window))
        allowance = run.allowance(self._cost(len(run.problem), run))
        if allowance is None and run.budget is not None and run.budget.then == "end":
            return None
        if allowance is None:
            run.keep_best()
            kept, fallback, counts = self._coast(run)
        else:
            kept, fallback, counts = self._search_step(run, allowance)
        before = run.problem
        x, ids = self._latest(run.window)[kept.parent], run.problem_ids[before[kept.parent]]
        state, unprojected = self._project(x, kept.state, ids)
        kept = dataclasses.replace(kept, state=state)
        out = run.take(kept, unprojected, fallback, counts, self.cfg, self._source.history, allowance is not None)
        self._warn_of_dead(run, before, out.step)
        return out

    def _cost(self, rows: int, run: BeamRun) -> int:
        return rows * self.cfg.branching_factor * (1 + run.ahead(self.cfg.lookahead))

    def _coast(self, run: BeamRun) -> tuple[Survivors, Tensor, dict[str, Any]]:
        """The deterministic step of every beam; a model that has none gives a fresh sample."""
        chunks, window, ids = run.chunks[run.step > 0], run.window, run.problem_ids[run.problem]
        if self._source.has_deterministic:
            taken = chunks.deterministic(window)
        else:
            fresh = torch.tensor([chunks.id_of(0, self.cfg.max_resample + 1)])
            taken = self._source.candidates(window, fresh, ids, seed=self.cfg.seed, step=run.step)[:, 0]
        rows = guardrails.finite_states(taken).nonzero().flatten()
        kept = _unscored(taken[rows], rows, 0 if self.include_deterministic else -1)
        none = torch.zeros(run.n, dtype=torch.int64, device=window.device)
        return kept, none > 0, {"nfe": len(window), "resamples": none, "nonfinite": none.clone(), "copies": len(rows)}

    def _search_step(self, run: BeamRun, allowance: float) -> tuple[Survivors, Tensor, dict[str, Any]]:
        """Survivors, which problems fell back ``[N]``, and counts."""
        cfg, step, chunks = self.cfg, run.step, run.chunks[run.step > 0]
        beams = Beams(run.window, run.problem, run.beam, run.offsets(cfg))
        ids = run.problem_ids[run.problem]
        search, nfe = self._search(run, chunks, beams, ids, 0)
        resamples = torch.zeros(run.n, dtype=torch.int64, device=ids.device)
        for again in range(1, cfg.max_resample + 1 if self._stochastic else 1):
            rows = search.rows_of(search.missed())
            if not len(rows) or nfe + self._cost(len(rows), run) > allowance:
                break
            redrawn, cost = self._search(run, chunks, beams.rows(rows), ids[rows], again)
            search.replace(rows, redrawn)
            resamples[run.problem[rows].unique()] += 1
            nfe += cost
        missed = search.missed()
        kept = search.survivors(cfg.min_score_spread)
        fallback = torch.zeros(run.n, dtype=torch.bool, device=ids.device)
        if bool(missed.any()):
            rows = search.rows_of(missed)
            fallback[run.problem[rows]] = True
            logger.info("step %d: fallback for problems %s", step, run.problem_ids[fallback].tolist())
            fallen, cost = self._fall_back(chunks, search, beams, ids, rows, step)
            kept = joined([kept, *fallen], beams.problem)
            nfe += cost
        nonfinite = torch.zeros_like(resamples).scatter_add_(0, run.problem, search.nonfinite)
        copies = search.pool.copies + len(kept)
        return kept, fallback, {"nfe": nfe, "resamples": resamples, "nonfinite": nonfinite, "copies": copies}

    def _fall_back(
        self, chunks: Chunks, search: StepSearch, beams: Beams, ids: Tensor, rows: Tensor, step: int
    ) -> tuple[list[Survivors], int]:
        """The deterministic steps of ``rows`` where they are finite; where a problem has none, its best candidates below the floor."""
        taken, cost = self._fallback(chunks, search, beams.window[rows], ids[rows], rows, step)  # type: ignore[arg-type]
        finite = guardrails.finite_states(taken)
        fallen = [_unscored(taken[finite], rows[finite], 0 if self.include_deterministic else -1)]
        below = search.below_floor(self.cfg.min_score_spread)
        if below is not None:
            problem = beams.problem[below.parent]
            wanted = torch.isin(problem, beams.problem[rows]) & ~torch.isin(problem, beams.problem[rows[finite]])
            low = below.rows(wanted)
            fallen.append(dataclasses.replace(low, collapsed=torch.zeros_like(low.collapsed)))
        return fallen, cost

    def _search(self, run: BeamRun, chunks: Chunks, beams: Beams, ids: Tensor, again: int) -> tuple[StepSearch, int]:
        """Generate, score and select among the candidates of all beams, chunk by chunk; and what it cost in model evaluations."""
        cfg, step, nfe = self.cfg, run.step, 0
        x, search = self._latest(beams.window), self._new_search(run, chunks, beams, again)
        watch = guardrails.DistinctWatch() if step == again == 0 and cfg.branching_factor > 1 else None
        for rows, start, candidates in chunks.of_step(beams.window, ids, step, again, beams.beam):
            if watch is not None:
                watch.look(rows.start, candidates)
            count = candidates.shape[0] * candidates.shape[1]
            context = ScoreContext(step, ids[rows])
            score = usable_scores(self._scored(x[rows], candidates, context), candidates, self.scorer.marks_nonfinite)
            value = self._ahead(run, chunks, beams.window[rows], candidates, score, context)
            ties = None if self.tie_breaker is None else self._tie_values(x[rows], candidates, context)
            marks = marks_of(candidates, 2) if self.drop_duplicates else None
            search.add(rows, start, candidates, score, value, ties, marks)
            nfe += count * (1 + run.ahead(cfg.lookahead))
            del candidates  # or the next chunk would be made while this one is still held
        if watch is not None and not watch.differ:
            after = chunks.id_of(0, cfg.max_resample + 2)  # ids that no group will draw
            nfe += probe(self._source, beams.window, ids, after, watch.at_once, seed=cfg.seed)
        return search, nfe

    def _new_search(self, run: BeamRun, chunks: Chunks, beams: Beams, again: int) -> StepSearch:
        cfg, subtrees = self.cfg, self.cfg.approach == "diverse_beam" and run.step > 0
        options: dict[str, Any] = {"floor": cfg.score_floor, "history": self._source.history}
        if cfg.approach == "particle":
            ids = run.problem_ids[beams.problem]
            options |= {"temperature": cfg.temperature, "uniforms": uniforms_of(cfg.seed, run.step, ids.unique_consecutive())}
            # in one chunk all states are at hand; else those drawn are made again
            make = None if chunks.size is None else lambda rows, at: self._made_again(chunks, beams, ids, rows, at, run.step, again)
            return ParticleSearch(beams, cfg.beam_width, cfg.branching_factor, make=make, **options)
        options |= {"ties": self.tie_breaker is not None, "marks": self.drop_duplicates}
        return StepSearch(beams, 1 if subtrees else cfg.beam_width, cfg.branching_factor, subtrees=subtrees, **options)

    def _made_again(self, chunks: Chunks, beams: Beams, ids: Tensor, rows: Tensor, positions: Tensor, step: int, again: int) -> Tensor:
        """The states ``[R, C, *S]`` of candidates that have been scored and dropped."""
        return chunks.again(beams.window[rows], ids[rows], beams.beam[rows], positions, step, again)

    def _scored(self, x: Tensor, candidates: Tensor, context: ScoreContext, scorer: Scorer | None = None) -> Tensor:
        scorer = self.scorer if scorer is None else scorer
        scores = scorer.score_group(x, candidates, context)
        if scores.shape != candidates.shape[:2]:
            raise ValueError(f"{type(scorer).__name__} returned shape {tuple(scores.shape)}; expected {tuple(candidates.shape[:2])}")
        return scores

    def _tie_values(self, x: Tensor, candidates: Tensor, context: ScoreContext) -> Tensor:
        return self._scored(x, candidates, context, self.tie_breaker).double().nan_to_num(nan=-torch.inf)

    def _ahead(self, run: BeamRun, chunks: Chunks, window: Tensor, candidates: Tensor, score: Tensor, context: ScoreContext) -> Tensor:
        """What candidates ``[m, b]`` are ranked by: their scores, prolonged by those of their deterministic continuation."""
        steps, b = run.ahead(self.cfg.lookahead), candidates.shape[1]
        if steps == 0:
            return score
        ids = context.problem_ids.repeat_interleave(b)
        window, x = window.repeat_interleave(b, 0), candidates.flatten(0, 1)
        value = score.flatten()
        for further in range(1, steps + 1):
            window = torch.cat([window[:, 1:], x.unsqueeze(1)], 1) if self._source.history > 1 else x
            after = chunks.continued(window)
            own = self._scored(x, after.unsqueeze(1), ScoreContext(context.step + further, ids))
            own = usable_scores(own, after.unsqueeze(1), self.scorer.marks_nonfinite)[:, 0]
            value = run.prolonged(value, own, self.cfg)
            value = torch.where(own.isfinite() & score.flatten().isfinite(), value, -torch.inf)
            x = after
        return value.view_as(score)

    def _warn_of_dead(self, run: BeamRun, before: Tensor, step: int) -> None:
        dead = sorted(set(before.unique().tolist()) - set(run.problem.tolist()))
        if dead:
            warnings.warn(
                f"step {step}: no finite next state for problems {run.problem_ids[dead].tolist()[:8]}, not even after "
                f"{self.cfg.max_resample} resamplings and the fallback; they are NaN from here on",
                RuntimeWarning,
                stacklevel=4,
            )


def check_beam(cfg: TTCConfig) -> None:
    """Raise ``ValueError`` for options that do not go together, rather than ignore one."""
    if not isinstance(cfg, TTCConfig):
        raise ValueError(f"cfg is a {type(cfg).__name__}; give a TTCConfig")
    k, b = cfg.beam_width, cfg.branching_factor
    if cfg.approach == "greedy" and k > 1:
        raise ValueError(
            f"beam_width is {k} and approach 'greedy', which keeps one beam; use approach 'beam', 'diverse_beam' or 'particle'"
        )
    if cfg.approach in ("beam", "diverse_beam") and k > b:
        raise ValueError(
            f"beam_width is {k} and the first step, which leaves a single state, has branching_factor={b} candidates; "
            "use a beam_width of at most that, or approach='particle'"
        )
    if cfg.select != "argmax":
        raise ValueError(f"select is {cfg.select!r}, a combination of candidates, of which a beam has no score; use select='argmax'")
    if cfg.refine_steps:  # REFINE: ttcfast.ttc.refine is called here
        raise ValueError(f"refine_steps is {cfg.refine_steps}, refinement of candidates, which TTCBeam does not do; use refine_steps=0")
    if cfg.approach != "particle" and cfg.temperature != 1.0:
        raise ValueError(
            f"temperature is {cfg.temperature} and approach {cfg.approach!r} does not sample by score; use approach='particle'"
        )


def _unscored(state: Tensor, parent: Tensor, position: int) -> Survivors:
    score = torch.full(parent.shape, -torch.inf, dtype=torch.float64, device=parent.device)
    return Survivors(state, parent, torch.full_like(parent, position), score, torch.zeros_like(parent, dtype=torch.bool))
