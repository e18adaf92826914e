"""One step of a search over several beams: draw, score, keep, and what to do where nothing can be kept."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from typing import Any

import torch
from torch import Tensor

from ttcfast.rewards.scorer import ScoreContext, Scorer
from ttcfast.runtime import distributed

from . import guardrails, sharding
from .candidates import Chunks
from .inference import TTCGreedy
from .paths import BeamRun
from .refine import refine_and_score, refine_as_configured, scored
from .result import BeamStepOutput
from .select.beams import Beams, StepSearch, Survivors, joined, usable_scores
from .select.particles import ParticleSearch, uniforms_of
from .select.topk import marks_of

logger = logging.getLogger(__name__)


class BeamStepper(TTCGreedy):
    """The step of ``TTCBeam``; its rollouts stand there."""

    tie_breaker: Scorer | None = None
    drop_duplicates = False

    def _advance(self, run: BeamRun) -> BeamStepOutput | None:
        """One step of the problems that are still going; None where the budget ends the rollout."""
        if not len(run.problem):
            return run.idle(self._latest(run.window))
        if run.budget is not None and self.cfg.shard == "candidates":
            run.seconds = distributed.total(run.seconds, "max")  # or some ranks would go on and others not
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

    def _measure(self, window: Tensor, problem_ids: Tensor) -> int:
        if self._candidate_bytes is None:
            measured = super()._measure(window, problem_ids)
            self._candidate_bytes = measured if self.cfg.shard is None else int(distributed.total(measured, "max"))
        return self._candidate_bytes

    def _cost(self, rows: int, run: BeamRun) -> int:
        """Model evaluations that a search step of so many beams takes at most."""
        drawn = self.cfg.branching_factor * (1 + self._copies * run.ahead(self.cfg.lookahead))
        return rows * (drawn + int(not self.include_deterministic))  # a fallback is at hand where it is candidate 0

    def _coast(self, run: BeamRun) -> tuple[Survivors, Tensor, dict[str, Any]]:
        """The deterministic step of every beam; a model that has none gives a fresh sample."""
        chunks, window, ids = run.chunks[run.step > run.first], run.window, run.problem_ids[run.problem]
        if self._source.has_deterministic:
            taken = chunks.deterministic(window)
        else:
            fresh = torch.tensor([chunks.id_of(0, self.cfg.max_resample + 1)])
            taken = self._source.candidates(window, fresh, ids, seed=self.cfg.seed, step=run.step)[:, 0]
        rows = guardrails.finite_states(taken).nonzero().flatten()
        kept = _unscored(taken[rows], rows, 0 if self.include_deterministic else -1)
        none = torch.zeros(run.n, dtype=torch.int64, device=window.device)
        return kept, none > 0, {"nfe": len(window), "resamples": none, "nonfinite": none, "distinct": none, "copies": len(rows)}

    def _search_step(self, run: BeamRun, allowance: float) -> tuple[Survivors, Tensor, dict[str, Any]]:
        """Survivors, which problems fell back ``[N]``, and counts."""
        cfg, step, chunks = self.cfg, run.step, run.chunks[run.step > run.first]
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
            run.watch.say(step, ids[search.without_score()].unique(), self._fallback_name)
            fallen, cost = self._fall_back(chunks, search, beams, ids, rows, step)
            kept = joined([kept, *fallen], beams.problem)
            nfe += cost
        nonfinite, distinct = (resamples.new_zeros(run.n).scatter_add_(0, run.problem, v) for v in (search.nonfinite, search.distinct))
        copies = search.pool.copies + len(kept)
        counts = {"nfe": nfe, "resamples": resamples, "nonfinite": nonfinite, "distinct": distinct, "copies": copies}
        counts["reward_evaluations"] = search.rewarded
        return kept, fallback, counts

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
        search = self._new_search(run, chunks, beams, again)
        left = self._latest(beams.window)
        floor = self.scorer.spread_floor(left, ScoreContext(step, ids))
        if floor is not None:
            search.spread.floor = floor.double()
            for _ in range(run.ahead(cfg.lookahead)):  # what candidates are ranked by has a score, and so a floor, of every step ahead
                search.spread.floor = run.prolonged(search.spread.floor, floor.double(), cfg)
        watch = guardrails.DistinctWatch(left, cfg.branching_factor) if again == 0 and cfg.branching_factor > 1 else None
        for rows, start, candidates in chunks.of_step(beams.window, ids, step, again, beams.beam):
            if watch is not None:
                watch.look(rows, start, candidates)
            drawn, further = candidates.shape[0] * candidates.shape[1], run.ahead(cfg.lookahead)
            nfe += drawn * (1 + self._copies * further)
            looked = self._hand_over(run, chunks, search, beams.window[rows], candidates, rows, start, ScoreContext(step, ids[rows]))
            search.rewarded += drawn * (looked + self._copies * further)
            del candidates  # or the next chunk would be made while this one is still held
        if cfg.shard == "candidates":
            sharding.merge(search, cfg.min_score_spread)
            nfe = int(distributed.total(nfe))
            if watch is not None:
                watch.projections = distributed.reduced(watch.projections, "sum")  # each was seen by one rank
                watch.at_once = int(distributed.total(watch.at_once, "max"))
        if watch is not None:
            search.distinct = watch.count()
            nfe += self._require_distinct(watch, search.distinct, chunks, beams.window, ids) if step == 0 else 0
        return search, nfe

    def _hand_over(
        self,
        run: BeamRun,
        chunks: Chunks,
        search: StepSearch,
        window: Tensor,
        candidates: Tensor,
        rows: slice,
        start: int,
        context: ScoreContext,
    ) -> int:
        """Refine, score and look ahead of a chunk ``[m, b, C, *S]``, hand it to the search; how often the reward looked at each here."""
        x, b = self._latest(window), candidates.shape[1]
        refined = refine_and_score(x, candidates, self.scorer, context, self.cfg, self._source.spec)
        candidates = refined.candidates
        score = usable_scores(refined.scores, candidates, self.scorer.marks_nonfinite)
        search.unscored[rows] += guardrails.finite_without_score(score, candidates)
        columns: dict[str, Tensor | None] = {"score": score, "value": self._ahead(run, chunks, window, candidates, score, context)}
        columns["ties"] = None if self.tie_breaker is None else self._tie_values(self.tie_breaker, x, candidates, context)
        columns["marks"] = marks_of(candidates, 2) if self.drop_duplicates else None
        for copy in range(self._copies):
            block = slice(copy * b, (copy + 1) * b)
            own: dict[str, Any] = {name: None if value is None else value[:, block] for name, value in columns.items()}
            search.add(rows, copy * self.cfg.branching_factor + start, candidates[:, block], **own)
        return refined.evaluations

    def _new_search(self, run: BeamRun, chunks: Chunks, beams: Beams, again: int) -> StepSearch:
        cfg, subtrees = self.cfg, self.cfg.approach == "diverse_beam" and run.step > 0
        width = cfg.branching_factor * self._copies
        options: dict[str, Any] = {"floor": cfg.score_floor, "history": self._source.history}
        if cfg.approach == "particle":
            ids = run.problem_ids[beams.problem]
            options |= {"temperature": cfg.temperature, "uniforms": uniforms_of(cfg.seed, run.step, ids.unique_consecutive())}
            # in one chunk all states are at hand; else those drawn are made again
            make = None if chunks.size is None else lambda rows, at: self._made_again(chunks, beams, ids, rows, at, run.step, again)
            return ParticleSearch(beams, cfg.beam_width, width, make=make, **options)
        options |= {"ties": self.tie_breaker is not None, "marks": self.drop_duplicates}
        return StepSearch(beams, 1 if subtrees else cfg.beam_width, width, subtrees=subtrees, **options)

    def _made_again(self, chunks: Chunks, beams: Beams, ids: Tensor, rows: Tensor, positions: Tensor, step: int, again: int) -> Tensor:
        """The states ``[R, C, *S]`` of candidates that have been scored and dropped."""
        window, b = beams.window[rows], self.cfg.branching_factor
        made = chunks.again(window, ids[rows], beams.beam[rows], positions % b, step, again).unsqueeze(1)
        context = ScoreContext(step, ids[rows])
        copies = refine_as_configured(self._latest(window), made, self.scorer, context, self.cfg, self._source.spec)
        return copies[torch.arange(len(rows), device=rows.device), positions // b]

    def _tie_values(self, tie_breaker: Scorer, x: Tensor, candidates: Tensor, context: ScoreContext) -> Tensor:
        return scored(x, candidates, tie_breaker, context).double().nan_to_num(nan=-torch.inf)

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
            own = scored(x, after.unsqueeze(1), self.scorer, ScoreContext(context.step + further, ids))
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


def _unscored(state: Tensor, parent: Tensor, position: int) -> Survivors:
    score = torch.full(parent.shape, -torch.inf, dtype=torch.float64, device=parent.device)
    return Survivors(state, parent, torch.full_like(parent, position), score, torch.zeros_like(parent, dtype=torch.bool))
