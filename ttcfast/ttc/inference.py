"""Greedy search at test time: at every step draw candidates, score them, keep the best."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ttcfast.checks import at_least
from ttcfast.rewards.scorer import ScoreContext, as_scorer
from ttcfast.spec import StochasticConfig, TTCConfig

from . import guardrails
from .candidates import Chunks
from .memory import bytes_per_candidate
from .models import as_source, probe
from .projection import check_projectable, project_conservation, projector, spec_of_problems
from .refine import copies, refine_and_score
from .result import RolloutResult, StepOutput
from .select.argmax import Argmax
from .select.combine import Climb, SoftmaxMean, Span

__all__ = ["TTCConfig", "TTCGreedy"]

logger = logging.getLogger(__name__)


class TTCGreedy:
    """Rolls a surrogate out, choosing each step among B candidates by a score, or combining them by it (``cfg.select``).

    All problems and candidates of a step go through the model at once, or in chunks of one size (``Chunks``) under ``cfg.chunk_size`` or
    ``cfg.memory_budget``; then no more than one chunk, the best candidate and candidate 0 are held. The candidates of a ``Surrogate`` are
    keyed, so that neither chunks nor the other problems of a batch change a choice; a foreign model draws in sequence, chunk by chunk
    (DECISIONS 7). Departs from the sketch in batching over problems and in its guardrails: candidates that are not finite are rejected; a
    group without a usable one, or below ``cfg.score_floor``, is drawn again, then the deterministic step is taken where it is finite, else
    the best candidate; scores without spread fall back to candidate 0; every such event is in the result (DECISIONS 6, 9).

    Args:
        fm: a ``Surrogate``, or any model with the sketch's ``sample_next(x_t, seed=None, multi=False)``.
        scorer: a ``Scorer``, or any callable ``score(x_t, cand_tp1)``; see ``as_scorer``. It sees raw candidates, before projection,
            unless it says ``scores_projected``.
        cfg: see ``TTCConfig``; None takes the defaults.

    Raises:
        ValueError: an option that greedy search does not have, ``include_deterministic=True`` for a model without a deterministic step, a
            projection on an open domain, a chunk too small for a scorer that needs all candidates together.
        TypeError: a model or scorer without the methods needed.

    Source: seeds/ttc-integration-plan.md section 6.
    """

    _selection = Argmax
    _check = staticmethod(guardrails.check_greedy)

    def __init__(self, fm: Any, scorer: Any, cfg: TTCConfig | None = None) -> None:
        cfg = TTCConfig() if cfg is None else cfg
        self._check(cfg)
        self.fm, self.cfg = fm, cfg
        self._source = as_source(fm, cfg)
        self.scorer = as_scorer(scorer, ndim=self._source.ndim)
        self.include_deterministic = self._source.has_deterministic if cfg.include_deterministic is None else cfg.include_deterministic
        if self.include_deterministic and not self._source.has_deterministic:
            raise ValueError(
                f"include_deterministic is True but {type(fm).__name__} has only sample_next and no deterministic step; wrap it in a "
                "Surrogate, or use include_deterministic=False"
            )
        self._copies = copies(cfg.refine_steps, cfg.refine_lengths)
        spec = self._source.spec
        if cfg.project is not None:
            check_projectable(spec)
            assert spec is not None  # or it could not be projected
            self.scorer = self.scorer.of_projected(projector(spec))
        if cfg.select == "span" and self.scorer.needs_group:
            raise ValueError(
                f"select is 'span' and {type(scorer).__name__} scores candidates against each other (z-scores), so that it cannot tell how "
                "good one combination is; use zscore=False, or select='argmax'"
            )
        self._candidate_bytes: int | None = None  # measured once, where there is a memory budget

    @overload
    def rollout(self, x0: Tensor, T: int, *, return_info: Literal[False] = False, problem_ids: Tensor | None = None) -> Tensor: ...

    @overload
    def rollout(self, x0: Tensor, T: int, *, return_info: Literal[True], problem_ids: Tensor | None = None) -> RolloutResult: ...

    def rollout(self, x0: Tensor, T: int, *, return_info: bool = False, problem_ids: Tensor | None = None) -> Tensor | RolloutResult:
        """Roll out ``T`` steps from ``x0``, without gradient.

        Args:
            x0: ``[C, *S]`` or ``[N, C, *S]``, physical units; ``[h, C, *S]`` or ``[N, h, C, *S]`` for a surrogate with history h.
            T: number of steps, at least 1.
            return_info: give a ``RolloutResult`` with scores, choices, counts and cost.
            problem_ids: int64 ``[N]``, which problems these are, for the scorer and the random streams; None counts from 0.

        Returns:
            Trajectory ``[C, T+1, *S]`` or ``[N, T+1, C, *S]``, in the dtype of ``x0``, its first frame ``x0``. A problem whose
            every candidate and fallback failed is NaN from that step on, with a warning.

        Raises:
            ValueError: ``T`` below 1, or an ``x0`` of other axes or channels than the model's, or not finite.
            DeterministicModelError: B > 1 and the model gives the same candidate every time.
        """
        began = time.perf_counter()
        x, single = self._start(x0, T)
        start = self._latest(x)
        trajectory = start.new_empty((start.shape[0], T + 1, *start.shape[1:]))
        trajectory[:, 0] = start
        steps = []
        for out in self.rollout_iter(x0, T, problem_ids=problem_ids):
            trajectory[:, out.step + 1] = out.state
            steps.append(dataclasses.replace(out, state=start.new_empty(0)))
        if trajectory.is_cuda:
            torch.cuda.synchronize(trajectory.device)
        frames = trajectory[0].transpose(0, 1).contiguous() if single else trajectory
        result = _collect(frames, steps, time.perf_counter() - began, self._source.stochastic if self._stochastic else None)
        logger.info("rollout of %d steps: %d model evaluations in %.2f s, %s", T, result.nfe, result.seconds, result.interventions())
        return result if return_info else result.trajectory

    def rollout_iter(self, x0: Tensor, T: int, *, problem_ids: Tensor | None = None) -> Iterator[StepOutput]:
        """The same rollout step by step, holding no more than the current state. Arguments and errors as ``rollout``."""
        x, single = self._start(x0, T)
        ids = self._problem_ids(problem_ids, x)
        logger.info("%s: %d problems, T=%d, %s", type(self).__name__, len(x), T, self.cfg)
        self._log_noise()
        return self._iterate(x, T, ids, single)

    @staticmethod
    def _problem_ids(problem_ids: Tensor | None, x: Tensor) -> Tensor:
        n = len(x)
        ids = torch.arange(n, device=x.device) if problem_ids is None else torch.as_tensor(problem_ids, device=x.device)
        if ids.shape != (n,) or ids.is_floating_point():
            raise ValueError(f"problem_ids are {ids.dtype} {tuple(ids.shape)}; give one integer for each of the {n} problems")
        return ids

    @property
    def _stochastic(self) -> bool:
        """Whether any candidate is more than the deterministic step."""
        return self.cfg.branching_factor > int(self.include_deterministic)

    def _log_noise(self) -> None:
        noise = self._source.stochastic
        if not self._stochastic:
            logger.info("noise: none, the only candidate is the deterministic step; seed %d", self.cfg.seed)
        elif noise is None:
            logger.info("noise: that of %s.sample_next; seed %d", type(self.fm).__name__, self.cfg.seed)
        else:
            rates = self._source.dropout_rates()
            logger.info(
                "noise: dropout rates %s at %d sites, latent_sigma %g, input_eps %g, seed %d; %s",
                *(sorted(set(rates)), len(rates), noise.latent_sigma, noise.input_eps, self.cfg.seed, noise),
            )

    @torch.no_grad()
    def _iterate(self, window: Tensor, T: int, problem_ids: Tensor, single: bool) -> Iterator[StepOutput]:
        live = torch.arange(window.shape[0], device=window.device)  # problems that are not frozen
        n, chunks = window.shape[0], self._chunks(window, problem_ids)
        watch = guardrails.ScoreWatch(self.scorer)
        for step in range(T):
            out = self._step(chunks, window, problem_ids[live], step, watch) if len(live) else None
            full = _embed(out, live, n, self._latest(window), self.cfg.branching_factor * self._copies, step)
            if out is not None:
                live, window = self._going_on(out, live, window, problem_ids)
            yield dataclasses.replace(full, state=full.state[0]) if single else full

    def _going_on(self, out: StepOutput, live: Tensor, window: Tensor, problem_ids: Tensor) -> tuple[Tensor, Tensor]:
        """The problems that are not frozen and what they go on from: memory of its own, since ``out`` is the caller's to change."""
        state, going = out.state, ~out.frozen
        if bool(out.frozen.any()):
            warnings.warn(
                f"step {out.step}: no finite next state for problems {problem_ids[live][out.frozen].tolist()[:8]}, not even after "
                f"{self.cfg.max_resample} resamplings and the fallback; they are NaN from here on",
                RuntimeWarning,
                stacklevel=3,
            )
            live, state, window = live[going], state[going], window[going]
        return live, torch.cat([window[:, 1:], state.unsqueeze(1)], 1) if self._source.history > 1 else state.clone()

    @torch.no_grad()
    def step_from(self, x: Tensor, *, step: int, problem_ids: Tensor | None = None) -> StepOutput:
        """One step from any states, as a rollout makes it at its step number ``step``: for comparing choices on the same states.

        Args:
            x: ``[N, C, *S]``, or ``[N, h, C, *S]`` with history, finite.
            step: enters the random streams and the scorer's context; 0 or more.
            problem_ids: as in ``rollout``.
        """
        at_least("step", step, 0)
        x, _ = self._start(x, 1)
        ids = self._problem_ids(problem_ids, x)
        return self._step(self._chunks(x, ids), x, ids, step, guardrails.ScoreWatch(self.scorer))

    def _chunks(self, window: Tensor, problem_ids: Tensor, **layout: Any) -> Chunks:
        options: dict[str, Any] = {"include_deterministic": self.include_deterministic, "whole_groups": self.scorer.needs_group}
        return Chunks(self._source, self.cfg, window, measure=lambda: self._measure(window, problem_ids), **options, **layout)

    def _measure(self, window: Tensor, problem_ids: Tensor) -> int:
        """Bytes that a candidate takes."""
        if self._candidate_bytes is None:
            after = (self.cfg.max_resample + 3) * self.cfg.beam_width * self.cfg.branching_factor  # ids that no group draws
            self._candidate_bytes = bytes_per_candidate(self._source, self.scorer, self.cfg, window, problem_ids, first_id=after)
        return self._candidate_bytes

    def _step(self, chunks: Chunks, window: Tensor, problem_ids: Tensor, step: int, watch: guardrails.ScoreWatch) -> StepOutput:
        """One step of the problems that are still going."""
        cfg, x = self.cfg, self._latest(window)
        group, nfe, drawn = self._draw(chunks, window, problem_ids, step, 0)
        resamples = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        for again in range(1, cfg.max_resample + 1 if self._stochastic else 1):
            rows = group.missed(cfg.score_floor).nonzero().flatten()
            if not len(rows):
                break
            redrawn, cost, again_drawn = self._draw(chunks, window[rows], problem_ids[rows], step, again)
            group.replace(rows, redrawn)
            resamples[rows] += 1
            nfe, drawn = nfe + cost, drawn + again_drawn
        state, chosen, collapsed, weights = group.choice(cfg.min_score_spread)
        fallback = group.missed(cfg.score_floor)
        frozen = torch.zeros_like(fallback)
        rows = fallback.nonzero().flatten()
        if len(rows):
            taken, cost = self._fallback(chunks, group, window[rows], problem_ids[rows], rows, step)
            nfe += cost
            finite = guardrails.finite_states(taken)  # elsewhere the best candidate stays, where one is finite though below the floor
            state[rows[finite]] = taken[finite]
            chosen[rows[finite]] = 0 if self.include_deterministic else -1
            frozen[rows] = ~finite & ~group.usable[rows]
            state[frozen], chosen[frozen] = torch.nan, -1
            if weights is not None:
                weights[rows] = 0.0
                weights[rows[chosen[rows] == 0], 0] = 1.0
            logger.info("step %d: fallback for problems %s", step, problem_ids[rows].tolist())
            watch.say(step, problem_ids[~group.usable & (group.unscored > 0)], self._fallback_name)
        state, unprojected = self._project(x, state, problem_ids)
        collapsed &= ~fallback
        counts = (fallback, resamples, group.nonfinite, group.distinct, collapsed, unprojected, frozen)
        return StepOutput(step, state, group.scores, chosen, *counts, nfe, drawn + group.reward_evaluations, weights)

    def _draw(self, chunks: Chunks, window: Tensor, problem_ids: Tensor, step: int, again: int) -> tuple[Argmax, int, int]:
        """Generate, refine and score one group of candidates per problem; and what it cost in evaluations of model and reward."""
        cfg, x = self.cfg, self._latest(window)
        nfe = rewarded = 0
        group = self._group(x, ScoreContext(step, problem_ids))
        group.floor = self.scorer.spread_floor(x, ScoreContext(step, problem_ids))
        watch = guardrails.DistinctWatch(x, cfg.branching_factor) if again == 0 and cfg.branching_factor > 1 else None
        for rows, start, candidates in chunks.of_step(window, problem_ids, step, again):
            if watch is not None:
                watch.look(rows, start, candidates)
            drawn = candidates.shape[0] * candidates.shape[1]
            nfe += drawn
            rewarded += drawn * self._judge(group, x[rows], candidates, rows, start, ScoreContext(step, problem_ids[rows]))
            del candidates  # or the next chunk would be made while this one is still held
        if watch is not None:
            group.distinct = watch.count()
            nfe += self._require_distinct(watch, group.distinct, chunks, window, problem_ids) if step == 0 else 0
        return group, nfe, rewarded

    def _require_distinct(self, watch: guardrails.DistinctWatch, count: Tensor, chunks: Chunks, window: Tensor, problem_ids: Tensor) -> int:
        """Look at more candidates where those of the first step are all the same, and raise if they are, too; how many were drawn."""
        if bool((count > 1).any()):
            watch.warn_of_few(count, getattr(self.fm, "model", self.fm))
            return 0
        after = chunks.id_of(0, self.cfg.max_resample + 2)  # ids that no group will draw
        return probe(self._source, window, problem_ids, after, watch.at_once, seed=self.cfg.seed)

    def _group(self, x: Tensor, context: ScoreContext) -> Argmax:
        """An empty group per problem, of the kind that ``cfg.select`` asks for."""
        cfg, width = self.cfg, self.cfg.branching_factor * self._copies
        if cfg.select == "softmax_mean":
            return SoftmaxMean(x, width, cfg.temperature)
        if cfg.select == "span":
            return Span(x, width, Climb(self.scorer, context, cfg.trust, self._source.spec))
        return self._selection(x, width)

    def _judge(self, group: Argmax, x: Tensor, candidates: Tensor, rows: slice, start: int, context: ScoreContext) -> int:
        """Refine and score a chunk ``[m, b, C, *S]``, hand it to its group, and say how often the reward looked at each candidate."""
        cfg, b = self.cfg, candidates.shape[1]
        refined = refine_and_score(x, candidates, self.scorer, context, cfg, self._source.spec)
        candidates, scores = refined.candidates, refined.scores
        usable = scores.isfinite()
        if not self.scorer.marks_nonfinite:
            usable = usable & guardrails.finite_states(candidates, 2)
        scores = torch.where(usable, scores.double(), -torch.inf)
        group.unscored[rows] += guardrails.finite_without_score(scores, candidates)
        for copy, block in enumerate(candidates.split(b, 1)):
            group.add(rows, copy * cfg.branching_factor + start, block, scores[:, copy * b : (copy + 1) * b])
        return refined.evaluations

    @property
    def _fallback_name(self) -> str:
        return "the deterministic step" if self._source.has_deterministic else "one fresh sample"

    def _fallback(self, chunks: Chunks, group: Argmax, window: Tensor, problem_ids: Tensor, rows: Tensor, step: int) -> tuple[Tensor, int]:
        """The deterministic step, or one fresh sample of a model that has none; and its cost."""
        if self.include_deterministic:
            return group.first[rows], 0
        if self._source.has_deterministic:
            return chunks.deterministic(window), len(rows)
        ids = torch.tensor([chunks.id_of(0, self.cfg.max_resample + 1)])
        return self._source.candidates(window, ids, problem_ids, seed=self.cfg.seed, step=step)[:, 0], len(rows)

    def _project(self, x: Tensor, state: Tensor, problem_ids: Tensor) -> tuple[Tensor, Tensor]:
        spec = self._source.spec
        if self.cfg.project is None or spec is None:
            return state, torch.zeros(len(x), dtype=torch.bool, device=x.device)
        return project_conservation(x, state, spec_of_problems(spec, problem_ids))

    def _latest(self, window: Tensor) -> Tensor:
        return window[:, -1] if self._source.history > 1 else window

    def _start(self, x0: Tensor, T: int) -> tuple[Tensor, bool]:
        guardrails.check_steps(T)
        return guardrails.check_start(x0, self._source.ndim, self._source.history, self._source.spec)


def _embed(out: StepOutput | None, live: Tensor, n: int, like: Tensor, width: int, step: int) -> StepOutput:
    """A step of the live problems among all ``n``: the frozen ones are NaN and count nothing."""
    if out is not None and len(live) == n:
        return out
    dtypes = {"scores": torch.float64, "weights": torch.float64, "chosen": torch.int64, "resamples": torch.int64}
    dtypes |= {"nonfinite": torch.int64, "distinct": torch.int64}
    fill = {"scores": -torch.inf, "chosen": -1, "frozen": True}
    values: dict[str, Any] = {"step": step, "nfe": 0 if out is None else out.nfe}
    values["reward_evaluations"] = 0 if out is None else out.reward_evaluations
    values["state"] = torch.full((n, *like.shape[1:]), torch.nan, dtype=like.dtype, device=like.device)
    each = ["scores", "chosen", "fallback", "resamples", "nonfinite", "distinct", "collapsed", "unprojected", "frozen"]
    for name in each + ["weights"] * (out is not None and out.weights is not None):
        shape = (n, width) if name in ("scores", "weights") else (n,)
        values[name] = torch.full(shape, fill.get(name, 0), dtype=dtypes.get(name, torch.bool), device=like.device)
    if out is not None:
        for name in values.keys() - {"step", "nfe", "reward_evaluations"}:
            values[name][live] = getattr(out, name)
    return StepOutput(**values)


_COLUMNS = ("scores", "chosen", "resamples", "nonfinite", "distinct", "collapsed", "unprojected", "frozen")


def _collect(trajectory: Tensor, steps: list[StepOutput], seconds: float, stochastic: StochasticConfig | None) -> RolloutResult:
    def over_time(name: str) -> Any:
        return torch.stack([getattr(s, name) for s in steps], 1)

    combined = any(s.weights is not None for s in steps)  # not at steps before which all problems froze
    return RolloutResult(
        trajectory=trajectory,
        fallbacks=over_time("fallback"),
        nfe=sum(s.nfe for s in steps),
        seconds=seconds,
        stochastic=stochastic,
        reward_evaluations=sum(s.reward_evaluations for s in steps),
        weights=torch.stack([torch.zeros_like(s.scores) if s.weights is None else s.weights for s in steps], 1) if combined else None,
        **{name: over_time(name) for name in _COLUMNS},
    )
