"""Search over several beams at test time: at every step keep the k best partial rollouts of each problem."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ttcfast.rewards.scorer import Scorer, as_scorer
from ttcfast.runtime import distributed
from ttcfast.spec import TTCConfig

from . import guardrails, sharding
from .budget import Budget
from .memory import reset_peak
from .paths import BeamRun, collected, without_state
from .result import BeamStepOutput, RolloutResult
from .resume import SavedRollout, fingerprint
from .search import BeamStepper
from .settings import checksum_of, settings_of

__all__ = ["TTCBeam"]

logger = logging.getLogger(__name__)


class TTCBeam(BeamStepper):
    """Rolls a surrogate out keeping the k best partial rollouts of each problem, and returns the best.

    At each step every beam draws B candidates; of the k B of a problem the k best by the score of their path go on. Candidates come in
    chunks and only survivors are copied, so that memory does not grow with B (``ttcfast.ttc.select.beams``). No two beams share noise: the
    candidates of beam j (beams are numbered from the best) have ids j B to (j + 1) B - 1. With one beam, no lookahead and another approach
    than ``"particle"`` the rollout is ``TTCGreedy``'s, bit for bit.

    The score of a path, ``cfg.score_aggregation``: ``"sum"``, ``"mean"``, ``"last"`` (of the last step), or ``"discounted"``,
    ``cfg.discount * path + score``, where older scores count less, between ``"last"`` (0) and ``"sum"`` (1).

    ``cfg.approach``:

    * ``"beam"``: as above.
    * ``"diverse_beam"``: the k best of the first step root subtrees; from then on each keeps its own best candidate.
    * ``"particle"``: k copies of the start; at each step k of the k B candidates are drawn by systematic resampling with weights
      ``exp(score / cfg.temperature)`` of the step's score, the same candidate perhaps several times. Random numbers are keyed by seed, step
      and problem. Weights need all scores of a step: they are kept (16 bytes for each candidate), and where candidates come in chunks the k
      drawn are generated once more.
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
            Particles are drawn, not ranked, and have none.
        drop_duplicates: of candidates of a problem that are equal in every bit only the best is kept; not of particles, which may be drawn
            several times.

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
        if self.cfg.approach == "particle" and tie_breaker is not None:
            raise ValueError(
                f"tie_breaker is a {type(tie_breaker).__name__} and approach 'particle' draws candidates by weight, so that no rank is "
                "tied; use tie_breaker=None, or approach='beam' or 'diverse_beam'"
            )
        if self.cfg.approach == "particle" and drop_duplicates:
            raise ValueError(
                "drop_duplicates is True and approach 'particle' draws good candidates several times; use drop_duplicates=False, or "
                "approach='beam' or 'diverse_beam'"
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
        ids = self._problem_ids(problem_ids, x)
        sharding.check_ranks(self.cfg, x, T, ids, budget, self._settings)
        reset_peak(x.device)
        part = sharding.part_of(len(x), self.cfg)
        if self.cfg.shard != "problems" or distributed.ranks() == 1:
            result = self._rolled(x, T, ids, budget, resume, len(x))
        elif budget is not None:
            raise ValueError(
                f"budget is {budget} and shard 'problems': no rank knows what the others spend; use shard='candidates', or no budget"
            )
        else:
            if self.cfg.memory_budget is not None:
                self._measure(x, ids)  # which all ranks do together, those too that have no problem
            place = None if resume is None else Path(resume) / f"rank{distributed.rank()}"
            own = self._rolled(x[part], T, ids[part], None, place, len(x)) if part.stop > part.start else None
            result = sharding.everyones(own, x.device)
        if single:
            result = dataclasses.replace(result, trajectory=result.trajectory[0].transpose(0, 1).contiguous())
        logger.info("rollout of %d steps: %d model evaluations in %.2f s, %s", T, result.nfe, result.seconds, result.interventions())
        return result if return_info else result.trajectory

    def rollout_iter(
        self, x0: Tensor, T: int, *, problem_ids: Tensor | None = None, budget: Budget | None = None
    ) -> Iterator[BeamStepOutput]:
        """The same search step by step, holding no past but what the beams are. ``state`` is that of the best beam at each step, so the
        states are a path of the tree only where one beam stays the best. Arguments and errors as ``rollout``."""
        x, single = self._start(x0, T)
        ids = self._problem_ids(problem_ids, x)
        if self.cfg.shard == "problems" and distributed.ranks() > 1:
            raise ValueError("shard is 'problems' and no rank has all states of a step; use rollout, or shard='candidates'")
        sharding.check_ranks(self.cfg, x, T, ids, budget, self._settings)
        run = self._begin(x, T, ids, budget, len(x))
        run.history = None
        for out in self._iterate_run(run, None):
            yield dataclasses.replace(out, state=out.state[0]) if single else out

    @torch.no_grad()
    def step_from(self, x: Tensor, *, step: int, problem_ids: Tensor | None = None) -> BeamStepOutput:
        """One step from any states, each the only beam of its problem, as in ``TTCGreedy.step_from``."""
        run = self._begin(self._start(x, 1)[0], step + 1, self._problem_ids(problem_ids, x), None, len(x))
        run.history, run.step, run.first = None, step, step
        out = self._advance(run)
        assert out is not None  # there is no budget
        return out

    def _rolled(
        self, x: Tensor, T: int, ids: Tensor, budget: Budget | None, resume: str | os.PathLike[str] | None, layout: int
    ) -> RolloutResult:
        run = self._begin(x, T, ids, budget, layout)
        saved = None
        if resume is not None:
            saved = SavedRollout(resume, self._fingerprint(x, T, ids, budget), describe=self._settings, writes=self._writes)
        if saved is not None:
            saved.restore(run)
        for _ in self._iterate_run(run, saved):
            pass
        return collected(run, self._latest(x), self._source.stochastic if self._stochastic else None)

    @property
    def _writes(self) -> bool:
        """Whether this process keeps the state of a rollout: of those that all have the same, the first alone does."""
        return self.cfg.shard != "candidates" or distributed.rank() == 0

    def _fingerprint(self, x: Tensor, T: int, ids: Tensor, budget: Budget | None) -> dict[str, Any]:
        cfg = {f.name: getattr(self.cfg, f.name) for f in dataclasses.fields(self.cfg) if f.name not in ("use_prm", "shard")}
        return fingerprint({**cfg, "T": T, "x0": checksum_of(x), "problem_ids": ids.tolist(), "budget": budget})

    def _settings(self) -> dict[str, Any]:
        """Of the model, the scorer and what else decides, by name."""
        found = {**settings_of("model", self.fm), **settings_of("scorer", self.scorer), **settings_of("tie_breaker", self.tie_breaker)}
        return {**found, "drop_duplicates": self.drop_duplicates}

    def _begin(self, x: Tensor, T: int, ids: Tensor, budget: Budget | None, layout: int) -> BeamRun:
        """A run at its start; ``layout`` is the number of problems that the size of chunks goes by."""
        cfg, n = self.cfg, len(x)
        logger.info("%s: %d problems, T=%d, %s", type(self).__name__, n, T, cfg)
        self._log_noise()
        if budget is not None:
            budget.check(n, T)
        copies = cfg.beam_width if cfg.approach == "particle" else 1
        problem = torch.arange(n, device=x.device).repeat_interleave(copies)
        run = BeamRun(x[problem], problem, torch.arange(copies, device=x.device).repeat(n), ids, T, cfg.beam_width, budget)
        run.watch = guardrails.ScoreWatch(self.scorer)
        sizes, share = (layout * copies, layout * cfg.beam_width), sharding.share(cfg)
        run.chunks = (self._chunks(x, ids, rows=sizes[0], share=share), self._chunks(x, ids, rows=sizes[1], share=share))
        return run

    @torch.no_grad()
    def _iterate_run(self, run: BeamRun, saved: SavedRollout | None) -> Iterator[BeamStepOutput]:
        while run.step < run.T:
            began = time.perf_counter()
            out = self._advance(run)
            if out is None:
                return
            if run.window.is_cuda:
                torch.cuda.synchronize(run.window.device)
            run.seconds += time.perf_counter() - began
            run.outputs.append(without_state(out))
            if saved is not None:
                saved.keep(run)
            yield out


def check_beam(cfg: TTCConfig) -> None:
    """Raise ``ValueError`` for options that do not go together, rather than ignore one."""
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
    """Raise ``ValueError`` where candidates would be combined."""
    if cfg.select != "argmax":
        raise ValueError(f"select is {cfg.select!r}, a combination of candidates, of which a beam has no score; use select='argmax'")
