"""What a search over several beams knows between two steps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttcfast.ops.topk import topk
from ttcfast.spec import StochasticConfig, TTCConfig

from .budget import Budget
from .history import History
from .memory import peak_bytes
from .result import BeamStepOutput, RolloutResult

if TYPE_CHECKING:
    from .candidates import Chunks
    from .guardrails import ScoreWatch
    from .select.beams import Survivors

_PER_PROBLEM = ("fallback", "resamples", "nonfinite", "distinct", "frozen")
_ALONG_PATH = ("chosen", "collapsed", "unprojected")


@dataclass
class BeamRun:
    """The live beams of all problems, one row each, those of a problem one after another, and how they came about.

    Attributes:
        window: ``[M, C, *S]`` (``[M, h, C, *S]`` with history).
        problem, beam: int64 ``[M]``.
        problem_ids: int64 ``[n]``, as the scorer and the random streams know the problems.
        T: steps of the rollout. k: beams of a problem at most.
        path: float64 ``[M]``, scores of the paths; with ``"mean"`` their sum.
        rows: int64 ``[M]``, each beam's row in the last layer of ``history``.
        spent, copies, seconds: so far.
        coasting: the budget is at its end.
        ended: of a problem that has died, its frames ``[t, C, *S]`` and notes ``[t]`` up to then.
    """

    window: Tensor
    problem: Tensor
    beam: Tensor
    problem_ids: Tensor
    T: int
    k: int
    budget: Budget | None = None
    step: int = 0
    spent: int = 0
    copies: int = 0
    seconds: float = 0.0
    coasting: bool = False
    history: History | None = field(default_factory=History)
    outputs: list[BeamStepOutput] = field(default_factory=list)
    ended: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = self.step  # until when each problem has one beam
        self.n = len(self.problem_ids)
        self.path = torch.zeros(len(self.problem), dtype=torch.float64, device=self.window.device)
        self.rows = torch.arange(len(self.problem), device=self.window.device)
        self.chunks: tuple[Chunks, Chunks]
        self.watch: ScoreWatch

    def ahead(self, lookahead: int) -> int:
        """Steps of a continuation that do not lead beyond the rollout's end."""
        return min(lookahead, self.T - 1 - self.step)

    def allowance(self, cost: int) -> float | None:
        """Evaluations that this step may take; None where the budget does not let it search any more."""
        if self.budget is None:
            return math.inf
        left = self.budget.left(self.spent, len(self.problem.unique()) * (self.T - 1 - self.step))
        self.coasting = self.coasting or self.budget.late(self.seconds) or cost > left
        return None if self.coasting else left

    def offsets(self, cfg: TTCConfig) -> Tensor:
        """What each beam's path adds to the rank of its candidates, 0 for the best: differences keep the digits that sums lose."""
        if cfg.score_aggregation == "last" or cfg.approach in ("particle", "greedy") or (cfg.approach == "diverse_beam" and self.step > 0):
            return torch.zeros_like(self.path)
        best = self.path.new_full((self.n,), -torch.inf).scatter_reduce_(0, self.problem, self.path, "amax")
        weight = cfg.discount ** (1 + self.ahead(cfg.lookahead)) if cfg.score_aggregation == "discounted" else 1.0
        return weight * (self.path - best[self.problem])

    @staticmethod
    def prolonged(path: Tensor, score: Tensor, cfg: TTCConfig) -> Tensor:
        """The score of a path with one step more; of ``"mean"`` the sum."""
        if cfg.score_aggregation == "last":
            return score
        return (cfg.discount * path if cfg.score_aggregation == "discounted" else path) + score

    def best_rows(self) -> Tensor:
        """The row with the highest path score of each live problem, of equal ones the first."""
        _, best = topk(self._table(self.path, -torch.inf), 1)
        index = self._table(torch.arange(len(self.problem), device=self.path.device), -1)
        return index.gather(1, best)[self.problem.unique_consecutive(), 0]

    def keep_best(self) -> None:
        """Drop all beams but each problem's best."""
        rows = self.best_rows()
        self.window, self.problem, self.path, self.rows = self.window[rows], self.problem[rows], self.path[rows], self.rows[rows]
        self.beam = torch.zeros_like(self.problem)

    def take(
        self, kept: Survivors, unprojected: Tensor, fallback: Tensor, counts: dict[str, Any], cfg: TTCConfig, history: int, searched: bool
    ) -> BeamStepOutput:
        """Go on to the survivors, whose states are in their final form, and say what the step was."""
        before, problem = self.beam, self.problem[kept.parent]
        self._bury(problem)
        scored = kept.score > -torch.inf
        path = self.path[kept.parent]
        self.path = torch.where(scored, self.prolonged(path, kept.score, cfg), path)
        notes = {"chosen": kept.position, "collapsed": kept.collapsed, "unprojected": unprojected}
        if self.history is not None:
            self.history.add(kept.state, self.rows[kept.parent], **notes)
            self.history.prune()
        self.window = torch.cat([self.window[kept.parent][:, 1:], kept.state.unsqueeze(1)], 1) if history > 1 else kept.state
        self.problem, self.rows = problem, torch.arange(len(problem), device=problem.device)
        self.beam = self.rows - torch.searchsorted(problem, problem)
        self.step, self.spent, self.copies = self.step + 1, self.spent + counts["nfe"], self.copies + counts["copies"]
        best = self.best_rows()
        per_problem: dict[str, Any] = {name: self._of_problems(value[best], -1) for name, value in notes.items()}
        alive = torch.zeros_like(fallback)
        alive[problem] = True
        mean = self.step if cfg.score_aggregation == "mean" else 1
        return BeamStepOutput(
            step=self.step - 1,
            state=self._of_problems(kept.state[best], torch.nan),
            scores=self._table(kept.score, -torch.inf),
            paths=self._table(self.path / mean, -torch.inf),
            parents=self._table(before[kept.parent], -1),
            positions=self._table(kept.position, -1),
            fallback=fallback,
            frozen=~alive,
            searched=searched,
            **per_problem,
            **counts,
        )

    def idle(self, like: Tensor) -> BeamStepOutput:
        """A step after all problems have died."""
        self.step += 1
        none, nothing = torch.zeros(self.n, dtype=torch.bool, device=like.device), like.new_full((self.n, self.k), -1, dtype=torch.int64)
        lowest = torch.full_like(nothing, -torch.inf, dtype=torch.float64)
        zeros = torch.zeros_like(nothing[:, 0])
        values: dict[str, Any] = {"state": like.new_full((self.n, *like.shape[1:]), torch.nan), "chosen": nothing[:, 0], "frozen": ~none}
        values |= {"scores": lowest, "paths": lowest, "parents": nothing, "positions": nothing, "resamples": zeros}
        values |= {"nonfinite": zeros, "distinct": zeros}
        values |= dict.fromkeys(("fallback", "collapsed", "unprojected"), none)
        return BeamStepOutput(step=self.step - 1, nfe=0, copies=0, searched=False, **values)

    def best_paths(self, start: Tensor) -> dict[str, Tensor]:
        """Of every problem's best path: ``states [n, steps + 1, C, *S]``, NaN behind its death, and notes ``[n, steps]``."""
        assert self.history is not None
        steps = len(self.outputs)
        out = {"states": start.new_full((self.n, steps + 1, *start.shape[1:]), torch.nan)}
        out["states"][:, 0] = start
        for name in _ALONG_PATH:
            shape, chosen = (self.n, steps), name == "chosen"
            out[name] = torch.full(shape, -1 if chosen else 0, dtype=torch.int64 if chosen else torch.bool, device=start.device)
        if len(self.problem):
            rows = self.rows[self.best_rows()]
            live = self.problem.unique_consecutive()
            out["states"][live, 1:] = self.history.states(rows)
            for name in _ALONG_PATH:
                out[name][live] = self.history.along(name, rows)
        for problem, record in self.ended.items():
            for name, value in record.items():
                first = 1 if name == "states" else 0
                out[name][problem, first : first + len(value)] = value
        return out

    def _bury(self, alive: Tensor) -> None:
        """Keep the best path of each problem that has no survivor, before its states are dropped."""
        dead = ~torch.isin(self.problem, alive)
        if self.history is None or not self.history.layers or not bool(dead.any()):
            return
        for row in self.best_rows().tolist():
            if bool(dead[row]):
                at = self.rows[row : row + 1]
                record = {name: self.history.along(name, at)[0] for name in _ALONG_PATH}
                self.ended[int(self.problem[row])] = {"states": self.history.states(at)[0], **record}

    def _table(self, values: Tensor, empty: float) -> Tensor:
        """Values ``[M]`` of the beams as ``[n, k]``."""
        out = torch.full((self.n, self.k), empty, dtype=values.dtype, device=values.device)
        out[self.problem, self.beam] = values
        return out

    def _of_problems(self, values: Tensor, empty: float) -> Tensor:
        """Values of the live problems among all: ``[n, ...]``."""
        flag = values.dtype == torch.bool
        out = torch.full((self.n, *values.shape[1:]), False if flag else empty, dtype=values.dtype, device=values.device)
        out[self.problem.unique_consecutive()] = values
        return out


def collected(run: BeamRun, start: Tensor, stochastic: StochasticConfig | None) -> RolloutResult:
    """The result of a run that has come to its end; ``start`` are the states that it left, ``[n, C, *S]``."""
    best = run.best_paths(start)
    frames = best.pop("states")

    def over_time(name: str) -> Tensor:
        return torch.stack([getattr(s, name) for s in run.outputs], 1)

    return RolloutResult(
        trajectory=frames,
        scores=over_time("scores"),
        fallbacks=over_time("fallback"),
        **{name: over_time(name) for name in _PER_PROBLEM[1:]},
        **best,
        nfe=run.spent,
        reward_evaluations=sum(s.reward_evaluations for s in run.outputs),
        seconds=run.seconds,
        stochastic=stochastic,
        copies=run.copies,
        peak_bytes=peak_bytes(start.device),
        beams=tuple(run.outputs),
        searched=sum(s.searched for s in run.outputs),
    )


def without_state(out: BeamStepOutput) -> BeamStepOutput:
    return dataclasses.replace(out, state=out.state.new_empty(0))
