"""The search engine: generate -> (refine) -> score -> keep, over the beams of each problem, of which a greedy search has one.

``TTCGreedy`` and ``TTCBeam`` are its doors. In this file a state passes from ``Search.rollout`` through ``_steps``, ``_step``, ``_search``,
``_draw`` and ``_take_in``. From there it goes

* to the reward by ``refine.py`` (moved copies, a score for each), the scorer (as ``rewards/arm.py``) and ``ops/arm.py``;
* to the selection by ``select/argmax.py`` (one beam), or by ``select/beams.py``, ``select/topk.py`` and ``ops/ranking.py`` (several).

``_draw`` has its candidates from ``candidates.py`` (chunks) and ``models.py`` (the model), and ``paths.py`` holds the beams between steps.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ttcfast.checks import at_least
from ttcfast.ops.keyed import mixed
from ttcfast.ops.ranking import marks_of
from ttcfast.rewards.scorer import ScoreContext, Scorer, as_scorer
from ttcfast.runtime import distributed
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.states.symmetry import Frames
from ttcfast.transfer import sent

from . import guardrails, sharding
from .budget import Budget
from .candidates import Chunks
from .history import History
from .memory import ChunkLimit, reset_peak
from .models import as_source, log_noise
from .paths import Beams, Rollout, Survivors
from .projection import check_projectable, project, projector
from .refine import copies, refine_and_score, scored
from .result import RolloutResult, StepOutput
from .resume import SavedRollout, settings_of
from .select.argmax import Argmax, Mean
from .select.beams import BestOfBeams
from .select.combine import SoftmaxMean, Span
from .select.keep import Chunk, Group, Keep, marked
from .select.particles import Particles, uniforms_of
from .step_graph import Outcome, StepGraphs

logger = logging.getLogger(__name__)


class Search:
    """Rollouts of a model that choose each step among candidates; see ``TTCGreedy`` and ``TTCBeam`` for arguments and errors."""

    reports_beams = True
    tie_breaker: Scorer | None = None
    drop_duplicates = False

    def __init__(self, fm: Any, scorer: Any, cfg: TTCConfig) -> None:
        self.fm, self.cfg = fm, cfg
        self._source = as_source(fm, cfg)
        self.scorer = as_scorer(scorer, ndim=self._source.ndim)
        self.include_deterministic = self._source.has_deterministic if cfg.include_deterministic is None else cfg.include_deterministic
        if self.include_deterministic and not self._source.has_deterministic:
            raise ValueError(
                f"include_deterministic is True but {type(fm).__name__} has only sample_next and no deterministic step; wrap it in a "
                "Surrogate, or use include_deterministic=False"
            )
        if cfg.project is not None:
            self.scorer = self.scorer.of_projected(projector(check_projectable(self._source.spec, cfg.project), cfg.project))
        self._copies = 1 if cfg.select == "mean" else copies(cfg.refine_steps, cfg.refine_lengths)
        self._stochastic = cfg.branching_factor > int(self.include_deterministic)  # some candidates are random
        self._limit = ChunkLimit(self._source, self.scorer, cfg)
        self._layouts: dict[torch.device, StateSpec] = {}

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
        """Roll out ``T`` steps from ``x0``, without gradient.

        Args:
            x0: ``[C, *S]`` or ``[N, C, *S]`` in physical units; ``[h, C, *S]`` or ``[N, h, C, *S]`` for a surrogate with history h.
            T: Number of steps, at least 1.
            return_info: Return a ``RolloutResult`` with scores, choices, counts and cost.
            problem_ids: int64 ``[N]``, the problems as the scorer and the random streams know them; None counts from 0.
            budget: Limit on evaluations or time; None for no limit.
            resume: Folder in which the state of the search is kept after every step, and from which a rollout that was killed goes on.

        Returns:
            Trajectory ``[C, T+1, *S]`` or ``[N, T+1, C, *S]`` in the dtype of ``x0``, its first frame ``x0``: each problem's path with the
            highest score, shorter where a budget ends it with ``"end"``. A problem whose candidates and fallback all failed is NaN from
            that step on, with a warning.

        Raises:
            ValueError: ``T`` is below 1, ``x0`` has other axes or channels than the model or is not finite, the budget is too small for
                the deterministic rollout, or the memory budget for one candidate.
            DeterministicModelError: B > 1 and the model returns the same candidate every time.
            CheckpointError: The folder holds another rollout; the error names the settings that differ.
        """
        x, single, ids = guardrails.check_start(x0, T, problem_ids, self._source)
        sharding.check_ranks(self.cfg, x, T, ids, budget, self._settings)
        roll = partial(self._rolled, T=T, budget=budget, chunks=self._chunks(x, ids))
        own_peak = reset_peak(x.device)
        result = sharding.in_parts(roll, x, ids, self.cfg, budget, resume)
        if not own_peak:
            result = dataclasses.replace(result, peak_bytes=None)
        if single:
            result = dataclasses.replace(result, trajectory=result.trajectory[0].transpose(0, 1).contiguous())
        counts = result.interventions() if logger.isEnabledFor(logging.INFO) else {}
        logger.info("rollout of %d steps: %d model evaluations in %.2f s, %s", T, result.evaluations, result.seconds, counts)
        return result if return_info else result.trajectory

    def rollout_iter(self, x0: Tensor, T: int, *, problem_ids: Tensor | None = None, budget: Budget | None = None) -> Iterator[StepOutput]:
        """Yield the steps of the same rollout one by one, holding only the current beams.

        ``state`` is that of the best beam at each step, so that the states are one path only where one beam stays the best. Arguments and
        errors as ``rollout``.
        """
        x, single, ids = guardrails.check_start(x0, T, problem_ids, self._source)
        if self.cfg.shard == "problems" and distributed.ranks() > 1:
            raise ValueError("shard is 'problems' and no rank has all states of a step; use rollout, or shard='candidates'")
        sharding.check_ranks(self.cfg, x, T, ids, budget, self._settings)
        run = self._begin(x, ids, T, budget, self._chunks(x, ids), history=False)
        steps = self._steps(run, None)
        return (dataclasses.replace(out, state=(out.state[0] if single else out.state).clone()) for out in steps)  # the caller's own copy

    @torch.no_grad()
    def step_from(self, x: Tensor, *, step: int, problem_ids: Tensor | None = None) -> StepOutput:
        """Make one step from any states as a rollout does at step ``step``, for comparing choices on the same states.

        Args:
            x: ``[N, C, *S]``, or ``[N, h, C, *S]`` with history, finite. Each state is the only beam of its problem.
            step: Index of the step for the random streams and the scorer's context, at least 0.
            problem_ids: As in ``rollout``.
        """
        at_least("step", step, 0)
        x, _, ids = guardrails.check_start(x, 1, problem_ids, self._source)
        out = self._step(self._begin(x, ids, step + 1, None, self._chunks(x, ids), history=False, step=step))
        assert out is not None  # there is no budget
        return out

    def _chunks(self, x: Tensor, ids: Tensor) -> tuple[Chunks, Chunks]:
        """Return the chunks of the first step and of later ones, which may have more beams; measures what their size depends on."""
        return self._chunks_of(len(x), self._limit.of(x, ids))

    def _chunks_of(self, n: int, limit: int | None) -> tuple[Chunks, Chunks]:
        cfg, first = self.cfg, self.cfg.beam_width if self.cfg.approach == "particle" else 1
        options: Any = {"include_deterministic": self.include_deterministic, "whole_groups": self.scorer.needs_group}
        options |= {"limit": limit, "share": sharding.share(cfg)}
        return Chunks(self._source, cfg, n * first, **options), Chunks(self._source, cfg, n * cfg.beam_width, **options)

    def _begin(
        self, x: Tensor, ids: Tensor, T: int, budget: Budget | None, chunks: tuple[Chunks, Chunks], *, history: bool = True, step: int = 0
    ) -> Rollout:
        cfg, n = self.cfg, len(x)
        logger.info("%s: %d problems, T=%d, %s", type(self).__name__, n, T, cfg)
        log_noise(self._source, self._stochastic, cfg.seed)
        beam = torch.arange(cfg.beam_width if cfg.approach == "particle" else 1, device=x.device)
        problem = torch.arange(n, device=x.device).repeat_interleave(len(beam))
        window, frames = x if len(beam) == 1 else x[problem], self._source.history
        width, past = cfg.branching_factor * self._copies, History() if history else None
        run = Rollout(window, problem, beam.repeat(n), ids, T, cfg, frames, width, self.reports_beams, budget, step, history=past)
        run.sizes, run.watch = chunks, guardrails.ScoreWatch(self.scorer)
        records = self._source.graph and x.is_cuda and not self.reports_beams and cfg.select != "span" and self.scorer.timeless
        run.graphs = StepGraphs() if records else None
        run.each = self._source.cost(_still(1))[0]
        if budget is not None:
            budget.check(n, T, self._cost(run, run.beams()), run.each)
        return run

    def _rolled(
        self, x: Tensor, ids: Tensor, resume: str | os.PathLike[str] | None, *, T: int, budget: Budget | None, chunks: tuple[Chunks, Chunks]
    ) -> RolloutResult:
        run = self._begin(x, ids, T, budget, chunks)
        saved = None if resume is None else SavedRollout(resume, run, x, describe=self._settings)
        if saved is not None:
            saved.restore(run)
            if saved.chunk_size != run.sizes[1].limit:  # measured again it may differ, and products of other shapes round differently
                run.sizes = self._chunks_of(len(x), saved.chunk_size)
        for _ in self._steps(run, saved):
            pass
        return run.result(x[:, -1] if self._source.history > 1 else x, self._source.stochastic if self._stochastic else None)

    def _settings(self) -> dict[str, Any]:
        """Return the settings of the model, the scorer and everything else that affects the result, by name."""
        parts = {"model": self.fm, "scorer": self.scorer, "tie_breaker": self.tie_breaker, "drop_duplicates": self.drop_duplicates}
        return {name: value for part in parts.items() for name, value in settings_of(*part).items()}

    @torch.no_grad()
    def _steps(self, run: Rollout, saved: SavedRollout | None) -> Iterator[StepOutput]:
        while run.step < run.T:
            began = time.perf_counter()
            out = self._step(run)
            ends, timed = out is None or run.step == run.T, run.budget is not None and run.budget.seconds is not None
            if run.window.is_cuda and (ends or timed):
                torch.cuda.synchronize(run.window.device)
            run.seconds += time.perf_counter() - began
            if out is None:
                return
            if run.history is not None:
                run.outputs.append(dataclasses.replace(out, state=out.state.new_empty(0)))
            if saved is not None:
                saved.keep(run)
            yield out

    def _step(self, run: Rollout) -> StepOutput | None:
        """Make one step of the unfinished problems; returns None if the budget ends the rollout."""
        if not len(run.problem):
            beams = run.beams()
            return self._move_on(run, beams, Survivors.unscored(beams.latest, beams.known.problem, -1), run.counts(), at_risk=False)
        if run.budget is not None and self.cfg.shard == "candidates":
            run.seconds = distributed.total(run.seconds, "max")  # otherwise only some ranks would continue
        allowance = run.allowance(0 if run.budget is None else self._cost(run, run.beams()))
        if allowance is not None:
            return self._search(run, allowance)
        return None if run.budget is not None and run.budget.then == "end" else self._coast(run)

    def _search(self, run: Rollout, allowance: float) -> StepOutput:
        """Draw candidates, redraw if none is usable, fall back if that does not help, and continue from the kept ones."""
        cfg, beams = self.cfg, run.beams()
        if (found := self._recorded(run, beams)) is not None:
            return found
        keep, evaluations = self._draw(run, beams, 0)
        resamples, fallbacks = run.problem_ids.new_zeros(run.n, dtype=torch.int64), run.problem_ids.new_zeros(run.n, dtype=torch.bool)
        missed = keep.missed()  # waits for the device
        for again in range(1, cfg.max_resample + 1 if self._stochastic else 1):
            if not len(missed) or evaluations + self._cost(run, beams.rows(missed), again) > allowance:
                break
            drawn, cost = self._draw(run, beams.rows(missed), again)
            keep.replace(missed, drawn)
            resamples[sent(beams.known.problem[missed], resamples.device)] += 1
            evaluations, missed = evaluations + cost, keep.missed()
        kept, below = keep.survivors(cfg.min_score_spread, missed)
        if len(missed):
            fallbacks[sent(beams.known.problem[missed], fallbacks.device)] = True
            logger.info("step %d: fallback for problems %s", run.step, beams.known.problem_ids[missed].unique().tolist())
            known = "the deterministic step" if self._source.has_deterministic else "one fresh sample"
            run.watch.say(run.step, beams.known.problem_ids[keep.without_score()].tolist(), known)
            if self.include_deterministic:
                taken = keep.first[sent(missed, keep.first.device)]
            else:
                taken, (own, solved) = self._plain_step(run, beams.rows(missed)), self._source.cost(_still(len(missed)))
                evaluations, keep.solver_steps = evaluations + own, keep.solver_steps + solved
            kept = self._with_fallback(kept, below, taken, missed, beams)
        seen = {"nonfinite": run.summed(keep.nonfinite), "distinct": run.summed(keep.distinct), "copies": keep.copies + len(kept)}
        counts = run.counts(fallbacks=fallbacks, resamples=resamples, searched=True, **seen, **_spent(keep, evaluations))
        return self._move_on(run, beams, kept, counts, keep.scores, at_risk=len(missed) > 0)

    def _recorded(self, run: Rollout, beams: Beams) -> StepOutput | None:
        """Make the step from its record; None where there is none, or where a problem finds no candidate."""
        if run.graphs is None or run.step == 0:
            return None
        found = run.graphs(partial(self._outcome, run), beams, mixed(self.cfg.seed, run.step))
        if found is None or len(marked(found.missed)):  # waits for the device
            return None
        _, kept, columns, spent = found.copied()
        seen = {name: run.summed(columns[name]) for name in ("nonfinite", "distinct")}
        counts = run.counts(searched=True, copies=len(kept), **seen, **spent)
        return run.take(kept, columns["unprojected"], counts, columns["scores"])

    def _outcome(self, run: Rollout, beams: Beams) -> Outcome:
        """The step of a greedy search if every problem finds a candidate, without a wait."""
        keep, evaluations = self._draw(run, beams, 0)
        assert isinstance(keep, Argmax)
        kept, unprojected = self._imposed(beams, keep.survivors(self.cfg.min_score_spread, _still(0)[:, 0])[0])
        columns = {"scores": keep.scores, "unprojected": unprojected, "nonfinite": keep.nonfinite, "distinct": keep.distinct}
        return Outcome(keep.without_candidate(), kept, columns, _spent(keep, evaluations))

    def _with_fallback(self, kept: Survivors, below: Survivors | None, taken: Tensor, rows: Tensor, beams: Beams) -> Survivors:
        """Return ``kept`` with fallbacks ``taken`` in the beams ``rows`` if finite, and the best below the floor in the other problems."""
        finite, problem = marked(guardrails.finite_states(taken)), beams.known.problem
        fallen = [Survivors.unscored(taken[sent(finite, taken.device)], rows[finite], 0 if self.include_deterministic else -1)]
        if below is not None:
            fallen.append(below.rows((~torch.isin(problem[below.parent], problem[rows[finite]])).nonzero().flatten()))
        return kept.joined(fallen, problem)

    def _coast(self, run: Rollout) -> StepOutput:
        """Step each problem's best beam beyond the end of the budget."""
        run.keep_best()
        beams = run.beams()
        taken = self._plain_step(run, beams)
        rows = marked(guardrails.finite_states(taken))
        kept = Survivors.unscored(taken[sent(rows, taken.device)], rows, 0 if self.include_deterministic else -1)
        evaluations, solved = self._source.cost(_still(len(beams)))
        counts = run.counts(evaluations=evaluations, solver_steps=solved, copies=len(rows))
        return self._move_on(run, beams, kept, counts, at_risk=len(rows) < len(beams))

    def _move_on(
        self, run: Rollout, beams: Beams, kept: Survivors, counts: dict[str, Any], scores: Tensor | None = None, *, at_risk: bool
    ) -> StepOutput:
        """Project the survivors and continue from them; ``at_risk`` if a problem may have none."""
        kept, unprojected = self._imposed(beams, kept)
        dead = run.ids[run.bury(beams.known.problem[kept.parent])].tolist() if at_risk else []
        out = run.take(kept, unprojected, counts, scores)
        if dead:
            guardrails.warn_of_dead(out.step, dead, self.cfg.max_resample)
        return out

    def _imposed(self, beams: Beams, kept: Survivors) -> tuple[Survivors, Tensor]:
        """Return the survivors with all that is imposed on them, and whether the raw state was kept instead, bool ``[R]``."""
        spec, origin = self._layout(kept.state.device), kept.origin
        if spec is not None and spec.given_channels:  # a combination of candidates rounds
            kept = dataclasses.replace(kept, state=spec.carried(kept.state, beams.latest[origin], channel_axis=1))
        if self.cfg.project is None or spec is None:
            return kept, torch.zeros_like(kept.collapsed)
        state, unprojected = project(self.cfg.project, beams.latest[origin], kept.state, spec.of_problems(beams.problem_ids[origin]))
        return dataclasses.replace(kept, state=state), unprojected

    def _layout(self, device: torch.device) -> StateSpec | None:
        """The layout of the states with its tensors on ``device``; they move once."""
        if self._source.spec is not None and device not in self._layouts:
            self._layouts[device] = self._source.spec.to(device)
        return self._layouts.get(device)

    def _draw(self, run: Rollout, beams: Beams, again: int) -> tuple[Keep, int]:
        """Generate, refine, score and keep candidates of all beams, chunk by chunk. Also returns the number of model evaluations."""
        cfg, step, evaluations = self.cfg, run.step, 0
        keep = self._keep(run, beams, again)
        watch = guardrails.DistinctWatch(beams.latest, cfg.branching_factor) if again == 0 and cfg.branching_factor > 1 else None
        for rows, start, candidates in run.chunks.of_step(beams, step, again):
            finite = None if watch is None else watch.look(rows, start, candidates)
            drawn = candidates.shape[0] * candidates.shape[1]
            own, solved = run.chunks.cost(beams.rows(rows), start, candidates.shape[1], again)
            further, solved_there = self._source.cost(_still(drawn)) if run.ahead else (0, 0)
            evaluations += own + further * self._copies * run.ahead
            keep.solver_steps += solved + solved_there * self._copies * run.ahead
            keep.reward_evaluations += drawn * self._take_in(run, keep, rows, start, candidates, finite, again)
            del candidates  # otherwise the next chunk would be created while this one is still held
        if cfg.shard == "candidates" and isinstance(keep, BestOfBeams):
            evaluations = sharding.merge(keep, watch, evaluations, cfg.min_score_spread)
        if watch is not None:
            keep.distinct = watch.count()
            if step == 0:
                one, after = beams.rows(slice(0, 1)), run.chunks.id_of(0, cfg.max_resample + 2)  # ids that no group uses
                more = partial(self._source.candidates, one.window, problem_ids=one.known.problem_ids, seed=cfg.seed, step=0)
                probes = watch.require_stochastic(keep.distinct, more, after, self._source.model)
                evaluations += self._source.cost(torch.arange(after, after + probes).unsqueeze(0))[0] if probes else 0
        return keep, evaluations

    def _take_in(self, run: Rollout, keep: Keep, rows: slice, start: int, candidates: Tensor, finite: Tensor | None, again: int) -> int:
        """Refine, score and select from a chunk ``[m, b, C, *S]``. Returns the number of reward evaluations per candidate."""
        beams, b = keep.beams.rows(rows), candidates.shape[1]
        x, context = beams.latest, self._context(run.step, beams)
        frames = self._frames(run, beams, torch.arange(start, start + b), again)
        refined = refine_and_score(x, candidates, self.scorer, context, self.cfg, self._layout(x.device), frames)
        states, usable = refined.candidates, refined.scores.isfinite()
        if not self.scorer.marks_nonfinite or finite is None:
            finite = guardrails.finite_states(states, 2)
            usable = usable & finite
        keep.unscored[rows] += torch.where(usable.any(1), 0, finite.sum(1))
        score = torch.where(usable, refined.scores.double(), -torch.inf)
        chunk = Chunk(states, score, self._ahead(run, beams, states, score, context))
        if self.tie_breaker is not None:
            chunk = chunk._replace(ties=scored(x, states, self.tie_breaker, context).double().nan_to_num(nan=-torch.inf))
        if self.drop_duplicates:
            chunk = chunk._replace(marks=marks_of(states, 2))
        if self.cfg.select == "mean":
            chunk = chunk.last_usable(b)
        for copy in range(self._copies):
            keep.add(rows, copy * self.cfg.branching_factor + start, chunk.part(slice(copy * b, (copy + 1) * b)))
        return refined.evaluations + self._copies * run.ahead

    def _frames(self, run: Rollout, beams: Beams, positions: Tensor, again: int) -> Frames | None:
        """The symmetries of candidates at ``positions`` that are to be refined; the deterministic step has the identity."""
        noise = self._source.stochastic
        if not self.cfg.refine_steps or noise is None or not noise.symmetry:
            return None
        ids = run.chunks.ids_of(beams, positions, again)
        return self._source.frames(beams.latest.shape[2:], ids, beams.known.problem_ids, seed=self.cfg.seed, step=run.step)

    def _context(self, step: int, beams: Beams) -> ScoreContext:
        return self._source.context(step, beams.problem_ids, beams.known.problem_ids)

    def _keep(self, run: Rollout, beams: Beams, again: int) -> Keep:
        """Return an empty selection of the configured kind."""
        cfg, context = self.cfg, self._context(run.step, beams)
        found = self.scorer.spread_floor(beams.latest, context)
        rounding = torch.full_like(beams.offset, -torch.inf) if found is None else found.double()
        if found is not None:
            for _ in range(run.ahead):  # candidates are ranked by the scores of every step ahead, each with such a spread
                rounding = run.prolonged(rounding, found.double())
        group = Group(beams, cfg.branching_factor * self._copies, rounding, cfg.score_floor)
        if not self.reports_beams:
            if cfg.select == "softmax_mean":
                return SoftmaxMean(group, cfg.temperature)
            if cfg.select == "span":
                return Span(group, self.scorer, context, cfg.trust, self._layout(beams.window.device))
            return (Mean if cfg.select == "mean" else Argmax)(group)
        if cfg.approach == "particle":
            uniforms = sent(uniforms_of(cfg.seed, run.step, beams.known.problem_ids.unique_consecutive()), beams.window.device)
            # a single chunk still holds all states; otherwise drawn ones are generated again
            make = None if run.chunks.size is None else partial(self._made_again, run, beams, again)
            return Particles(group, cfg.beam_width, temperature=cfg.temperature, uniforms=uniforms, make=make)
        subtrees, ties = cfg.approach == "diverse_beam" and run.step > 0, self.tie_breaker is not None
        return BestOfBeams(group, 1 if subtrees else cfg.beam_width, subtrees=subtrees, ties=ties, marks=self.drop_duplicates)

    def _made_again(self, run: Rollout, beams: Beams, again: int, rows: Tensor, positions: Tensor) -> Tensor:
        """Regenerate the states ``[R, C, *S]`` of candidates that were scored and dropped; rows and positions are on the host."""
        cfg, own, at = self.cfg, beams.rows(rows), positions % self.cfg.branching_factor
        made = run.chunks.again(own, at, run.step, again).unsqueeze(1)
        frames, context = self._frames(run, own, at.unsqueeze(1), again), self._context(run.step, own)
        group = refine_and_score(own.latest, made, self.scorer, context, cfg, self._layout(made.device), frames).candidates
        copy = sent(positions // cfg.branching_factor, made.device)
        return group[torch.arange(len(rows), device=made.device), copy]

    def _ahead(self, run: Rollout, beams: Beams, candidates: Tensor, score: Tensor, context: ScoreContext) -> Tensor:
        """Return the values that rank candidates ``[m, b]``: their scores plus those of their deterministic continuation."""
        if run.ahead == 0:
            return score
        b = candidates.shape[1]
        each, window, x = context.repeated(b), beams.window.repeat_interleave(b, 0), candidates.flatten(0, 1)
        value = score.flatten()
        for further in range(1, run.ahead + 1):
            window, step = torch.cat([window[:, 1:], x.unsqueeze(1)], 1) if self._source.history > 1 else x, context.step + further
            later = self._source.context(step, each.problem_ids, each.known)
            after = run.chunks.continued(window, each.on_host, step)
            found = scored(x, after.unsqueeze(1), self.scorer, later)[:, 0].double()
            usable = found.isfinite() & score.flatten().isfinite()
            if not self.scorer.marks_nonfinite:
                usable &= guardrails.finite_states(after)
            value, x = torch.where(usable, run.prolonged(value, found), -torch.inf), after
        return value.view_as(score)

    def _plain_step(self, run: Rollout, beams: Beams) -> Tensor:
        """Return the deterministic step of each beam, or a fresh sample if the model has none, ``[M, C, *S]``."""
        if self._source.has_deterministic:
            return run.chunks.deterministic(beams, run.step)
        fresh = torch.tensor([run.chunks.id_of(0, self.cfg.max_resample + 1)])
        return self._source.candidates(beams.window, fresh, beams.known.problem_ids, seed=self.cfg.seed, step=run.step)[:, 0]

    def _cost(self, run: Rollout, beams: Beams, again: int = 0) -> int:
        """Return the most model evaluations that a search step of these beams can take."""
        width, still = self.cfg.branching_factor, self._source.cost(_still(len(beams)))[0]
        drawn = run.chunks.cost(beams, 0, width, again)[0]
        further = width * self._copies * run.ahead + int(not self.include_deterministic)  # candidate 0 is a fallback at hand
        return drawn + still * further


def _spent(keep: Keep, evaluations: int) -> dict[str, int]:
    return {"evaluations": evaluations, "reward_evaluations": keep.reward_evaluations, "solver_steps": keep.solver_steps}


def _still(rows: int) -> Tensor:
    """Ids of so many deterministic steps, each of a state of its own."""
    return torch.zeros(rows, 1, dtype=torch.int64)
