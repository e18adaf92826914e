"""Holds the beams of a rollout between two steps, and what a step keeps."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ttcfast.ops.topk import topk
from ttcfast.spec import StochasticConfig, TTCConfig
from ttcfast.transfer import sent

from .budget import Budget
from .history import ALONG_PATH, History
from .memory import peak_bytes
from .result import BeamStepOutput, RolloutResult, StepOutput

if TYPE_CHECKING:
    from .candidates import Chunks
    from .guardrails import ScoreWatch
    from .step_graph import StepGraphs


class Known(NamedTuple):
    """Columns of ``Beams`` on the host: chunks, random streams and messages need them, and reading them waits for no device.

    While a step is recorded (``step_graph.py``) they are on the device.
    """

    problem: Tensor
    beam: Tensor
    problem_ids: Tensor

    @classmethod
    def of(cls, problem: Tensor, problem_ids: Tensor) -> Known:
        """The columns of beams of ``problem [M]``, ascending, of problems with the ids ``[n]``."""
        return cls(problem, torch.arange(len(problem)) - torch.searchsorted(problem, problem), problem_ids[problem])


@dataclass(frozen=True)
class Beams:
    """The states that a step leaves, one row each, grouped by problem.

    Attributes:
        window: ``[M, C, *S]``, or ``[M, h, C, *S]`` with history.
        problem: int64 ``[M]``, index of the problem in the rollout, ascending.
        beam: int64 ``[M]``, index of the beam within its problem, from 0.
        problem_ids: int64 ``[M]``, the problem as the scorer and the random streams know it.
        offset: float64 ``[M]``, amount that a beam's past adds to the rank of its candidates; 0 for a problem's best beam.
        history: Number of frames that the model sees.
        known: Problem, beam and problem ids on the host; None reads them from the device.
    """

    window: Tensor
    problem: Tensor
    beam: Tensor
    problem_ids: Tensor
    offset: Tensor
    history: int = 1
    known: Known = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.known is None:
            object.__setattr__(self, "known", Known(self.problem.cpu(), self.beam.cpu(), self.problem_ids.cpu()))

    def __len__(self) -> int:
        return len(self.problem)

    @property
    def latest(self) -> Tensor:
        """The newest frames, ``[M, C, *S]``."""
        return self.window[:, -1] if self.history > 1 else self.window

    def rows(self, rows: slice | Tensor) -> Beams:
        """Some of them, by a slice or by indices on the host."""
        at = rows if isinstance(rows, slice) else sent(rows, self.window.device)
        columns = self.window[at], self.problem[at], self.beam[at], self.problem_ids[at], self.offset[at]
        return Beams(*columns, history=self.history, known=Known(*(column[rows] for column in self.known)))


@dataclass(frozen=True)
class Survivors:
    """The states that a step keeps, one row each, ordered by problem and rank.

    Attributes:
        state: ``[R, C, *S]``.
        parent: int64 ``[R]`` on the host, row of ``Beams`` that it comes from.
        position: int64 ``[R]``, position of the candidate in its beam's group; -1 for a state that is no candidate.
        score: float64 ``[R]``, score of this step alone; -inf for a state without one.
        collapsed: bool ``[R]``, as in ``StepOutput``.
        weights: float64 ``[R, B]``, share of each candidate in the state; None where candidates are not combined.
        every: Whether there is one for each row of ``Beams``, in order.
    """

    state: Tensor
    parent: Tensor
    position: Tensor
    score: Tensor
    collapsed: Tensor
    weights: Tensor | None = None
    every: bool = False

    @functools.cached_property
    def origin(self) -> slice | Tensor:
        """What selects the parents' entries of a column of ``Beams`` on its device."""
        return slice(None) if self.every else sent(self.parent, self.state.device)

    def __len__(self) -> int:
        return len(self.parent)

    @staticmethod
    def unscored(state: Tensor, parent: Tensor, position: int) -> Survivors:
        """States taken without looking at a score: the deterministic step, or a fresh sample."""
        score = torch.full(parent.shape, -torch.inf, dtype=torch.float64, device=state.device)
        at = torch.full_like(score, position, dtype=torch.int64)
        return Survivors(state, parent, at, score, torch.zeros_like(at, dtype=torch.bool))

    def rows(self, rows: Tensor) -> Survivors:
        """Some of them, by indices on the host."""
        at = sent(rows, self.state.device)
        columns = self.state[at], self.parent[rows], self.position[at], self.score[at], self.collapsed[at]
        return Survivors(*columns, weights=None if self.weights is None else self.weights[at])

    def joined(self, others: list[Survivors], problem: Tensor) -> Survivors:
        """These and ``others``, which are no combinations, ordered by the problem ``[M]``, on the host, of their parents."""
        if self.weights is not None:
            others = [dataclasses.replace(other, weights=_one_hot(other.position, self.weights)) for other in others]
        parts = [self, *others]
        columns = {f.name: [getattr(p, f.name) for p in parts] for f in dataclasses.fields(self) if f.name != "every"}
        together: dict[str, Any] = {name: torch.cat(column) for name, column in columns.items() if column[0] is not None}
        return Survivors(**together).rows(problem[together["parent"]].argsort(stable=True))


def _one_hot(position: Tensor, like: Tensor) -> Tensor:
    """Return weight 1 for candidate 0 where it was taken and 0 for all others, in the shape of ``like``."""
    weights = like.new_zeros((len(position), like.shape[1]))
    weights[:, 0] = (position == 0).to(weights.dtype)
    return weights


@dataclass
class Rollout:
    """The live beams of all problems, and how they came about.

    Attributes:
        window: ``[M, C, *S]``, or ``[M, h, C, *S]`` with history.
        problem, beam: int64 ``[M]``, as in ``Beams``.
        problem_ids: int64 ``[n]``, all problems as the scorer and the random streams know them.
        ids: The same on the host.
        known: ``Known`` of the beams.
        T: Number of steps.
        cfg: Configuration of the search.
        frames: Number of frames that the model sees.
        width: Number of candidates of a beam, refined copies included.
        reports_beams: Steps are reported as ``BeamStepOutput``.
        step, spent, copies, seconds: Steps made, model evaluations, states copied and time so far.
        coasting: The budget is spent.
        path: float64 ``[M]``, score of each path; with ``"mean"`` its sum.
        rows: int64 ``[M]``, row of each beam in the last layer of ``history``.
        history: The past, or None where only the current states are wanted.
        ended: Row by problem of the past of problems that have died: states ``[t, C, *S]`` and notes ``[t]``.
    """

    window: Tensor
    problem: Tensor
    beam: Tensor
    problem_ids: Tensor
    T: int
    cfg: TTCConfig
    frames: int
    width: int
    reports_beams: bool
    budget: Budget | None = None
    step: int = 0
    spent: int = 0
    copies: int = 0
    seconds: float = 0.0
    coasting: bool = False
    history: History | None = field(default_factory=History)
    outputs: list[StepOutput] = field(default_factory=list)
    ended: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.first = self.step  # the step that leaves one beam of each problem
        self.n, self.k = len(self.problem_ids), self.cfg.beam_width
        self.path = torch.zeros(len(self.problem), dtype=torch.float64, device=self.window.device)
        self.rows = torch.arange(len(self.problem), device=self.window.device)
        self.ids = self.problem_ids.cpu()
        self.look()
        self.sizes: tuple[Chunks, Chunks]
        self.each = 1  # model evaluations of a deterministic step
        self.watch: ScoreWatch
        self.graphs: StepGraphs | None = None  # recorded steps

    def look(self) -> None:
        """Read from the device what the host has to know of the beams."""
        self.known, self._known_rows = Known.of(self.problem.cpu(), self.ids), self.rows.cpu()

    @property
    def chunks(self) -> Chunks:
        """The division of this step's candidates: at the first step there are fewer beams."""
        return self.sizes[self.step > self.first]

    @property
    def ahead(self) -> int:
        """Number of lookahead steps that do not lead beyond the end of the rollout."""
        return min(self.cfg.lookahead, self.T - 1 - self.step)

    @property
    def live(self) -> Tensor:
        """The problems that have a beam, ascending, on the host."""
        live: Tensor = self.known.problem if self.k == 1 else torch.unique_consecutive(self.known.problem)
        return live

    @property
    def _live_there(self) -> Tensor:
        """The same on the device."""
        return self.problem if self.k == 1 else sent(self.live, self.problem.device)

    def allowance(self, cost: int) -> float | None:
        """Evaluations that this step may take; None where the budget does not allow another step of ``cost`` evaluations."""
        if self.budget is None:
            return math.inf
        left = self.budget.left(self.spent, self.each * len(self.live) * (self.T - 1 - self.step))
        self.coasting = self.coasting or self.budget.late(self.seconds) or cost > left
        return None if self.coasting else left

    def beams(self) -> Beams:
        """The states that the coming step leaves."""
        cfg, offset = self.cfg, torch.zeros_like(self.path)
        independent = cfg.approach in ("particle", "greedy") or (cfg.approach == "diverse_beam" and self.step > 0)
        if cfg.score_aggregation != "last" and not independent:
            best = self.path.new_full((self.n,), -torch.inf).scatter_reduce_(0, self.problem, self.path, "amax")
            weight = cfg.discount ** (1 + self.ahead) if cfg.score_aggregation == "discounted" else 1.0
            offset = weight * (self.path - best[self.problem])  # differences keep digits that sums would lose
        return Beams(self.window, self.problem, self.beam, self.problem_ids[self.problem], offset, self.frames, self.known)

    def prolonged(self, path: Tensor, score: Tensor) -> Tensor:
        """Score of a path with one more step; with ``"mean"`` the sum."""
        if self.cfg.score_aggregation == "last":
            return score
        return (self.cfg.discount * path if self.cfg.score_aggregation == "discounted" else path) + score

    def best_rows(self) -> Tensor:
        """Row of the path with the highest score of each live problem; the first among equals."""
        index = torch.arange(len(self.problem), device=self.path.device)
        if self.k == 1:
            return index
        _, best = topk(self._table(self.path, -torch.inf), 1)
        return self._table(index, -1).gather(1, best)[self._live_there, 0]

    def keep_best(self) -> None:
        """Drop every beam but the best of each problem."""
        if len(self.live) == len(self.known.problem):
            return
        rows = self.best_rows()
        self.window, self.problem, self.path, self.rows = self.window[rows], self.problem[rows], self.path[rows], self.rows[rows]
        self.beam = torch.zeros_like(self.problem)
        self.look()

    def bury(self, alive: Tensor) -> Tensor:
        """Set the best path of each problem aside that is not among ``alive``, and return those problems, all on the host."""
        dead = ~torch.isin(self.live, alive)
        problems, rows = self.live[dead], self.best_rows()[sent(dead.nonzero().flatten(), self.rows.device)]
        if self.history is not None and self.history.layers:
            for problem, row in zip(problems.tolist(), self.rows[rows].unsqueeze(1)):
                record = self._blank(1, len(self.history.layers), self.history.layers[0].states)
                self.history.fill(record, torch.zeros_like(row), row)
                self.ended[problem] = {name: value[0, int(name == "states") :] for name, value in record.items()}
        return problems

    def counts(self, **known: Any) -> dict[str, Any]:
        """The fields of ``StepOutput`` that count something, nothing counted but what is given."""
        zeros = torch.zeros(self.n, dtype=torch.int64, device=self.window.device)
        counts: dict[str, Any] = {"fallbacks": zeros > 0, "resamples": zeros, "nonfinite": zeros, "distinct": zeros, "evaluations": 0}
        return counts | {"reward_evaluations": 0, "solver_steps": 0, "copies": 0, "searched": False, **known}

    def summed(self, values: Tensor) -> Tensor:
        """Sums over the beams of each problem, int64 ``[n]``, of values ``[M]``."""
        if self.k == 1 and len(values) == self.n:
            return values
        return values.new_zeros(self.n).scatter_add_(0, self.problem, values)

    def take(self, kept: Survivors, unprojected: Tensor, counts: dict[str, Any], scores: Tensor | None) -> StepOutput:
        """Move on to the survivors.

        Args:
            kept: The survivors, their states in final form.
            unprojected: bool ``[R]``, as in ``StepOutput``.
            counts: As ``counts`` returns them.
            scores: float64 ``[M, B]``, the scores of all candidates, for a search that reports them.
        """
        before, origin = self.beam, kept.origin
        each = self.path.new_full((len(before), self.width), -torch.inf) if scores is None else scores
        of_candidates = None if self.reports_beams else self._of_problems(each, -torch.inf)
        path = self.path[origin]
        self.path = torch.where(kept.score > -torch.inf, self.prolonged(path, kept.score), path)
        notes = {"chosen": kept.position, "collapsed": kept.collapsed, "unprojected": unprojected}
        if self.history is not None and len(kept):
            self.history.add(kept.state, self.rows[origin], self._known_rows[kept.parent], **notes)
            if self.k > 1:
                self.history.prune()
        self.window = torch.cat([self.window[origin][:, 1:], kept.state.unsqueeze(1)], 1) if self.frames > 1 else kept.state
        self.problem = self.problem[origin]
        if not kept.every:
            self.known = Known.of(self.known.problem[kept.parent], self.ids)
        self.rows, self._known_rows = torch.arange(len(kept), device=before.device), torch.arange(len(kept))
        self.beam = self.rows - torch.searchsorted(self.problem, self.problem)
        self.step, self.spent, self.copies = self.step + 1, self.spent + counts["evaluations"], self.copies + counts["copies"]
        best = slice(None) if self.k == 1 else self.best_rows()
        frozen = torch.ones_like(counts["fallbacks"])
        frozen[self.problem] = False
        common: dict[str, Any] = {name: self._of_problems(notes[name][best], empty) for name, empty in ALONG_PATH.items()}
        common |= {"step": self.step - 1, "state": self._of_problems(kept.state[best], torch.nan), "frozen": frozen, **counts}
        if of_candidates is not None:
            del common["copies"]
            weights = None if kept.weights is None else self._of_problems(kept.weights, 0.0)
            return StepOutput(**common, scores=of_candidates, weights=weights)
        mean = self.step if self.cfg.score_aggregation == "mean" else 1
        return BeamStepOutput(
            **common,
            scores=self._table(kept.score, -torch.inf),
            paths=self._table(self.path / mean, -torch.inf),
            parents=self._table(before[origin], -1),
            positions=self._table(kept.position, -1),
        )

    def best_paths(self, start: Tensor) -> dict[str, Tensor]:
        """States ``[n, steps + 1, C, *S]`` and notes ``[n, steps]`` of each problem's best path from ``start [n, C, *S]``."""
        assert self.history is not None
        out = self._blank(self.n, len(self.outputs), start)
        out["states"][:, 0] = start
        if len(self.problem):
            self.history.fill(out, self._live_there, self.rows[self.best_rows()])
        for problem, record in self.ended.items():
            for name, value in record.items():
                first = int(name == "states")
                out[name][problem, first : first + len(value)] = value
        return out

    def result(self, start: Tensor, stochastic: StochasticConfig | None) -> RolloutResult:
        """The result of a rollout that has come to its end; ``start`` are the states that it left, ``[n, C, *S]``."""
        best, steps = self.best_paths(start), self.outputs

        def over_time(name: str) -> Tensor:
            return torch.stack([getattr(s, name) for s in steps], 1)

        weights = [torch.zeros_like(s.scores) if s.weights is None else s.weights for s in steps]
        columns = ("scores", "fallbacks", "resamples", "nonfinite", "distinct", "frozen")
        return RolloutResult(
            trajectory=best.pop("states"),
            **{name: over_time(name) for name in columns},
            **best,
            evaluations=self.spent,
            reward_evaluations=sum(s.reward_evaluations for s in steps),
            solver_steps=sum(s.solver_steps for s in steps),
            seconds=self.seconds,
            stochastic=stochastic,
            copies=self.copies if self.reports_beams else None,
            peak_bytes=peak_bytes(start.device),
            beams=tuple(s for s in steps if isinstance(s, BeamStepOutput)),
            searched=sum(s.searched for s in steps),
            weights=torch.stack(weights, 1) if any(s.weights is not None for s in steps) else None,
            chunk_size=self.sizes[1].limit,
        )

    def _blank(self, n: int, steps: int, like: Tensor) -> dict[str, Tensor]:
        """Return paths of ``n`` problems without entries: NaN states and empty notes."""
        out = {"states": like.new_full((n, steps + 1, *like.shape[1:]), torch.nan)}
        return out | {name: torch.full((n, steps), empty, device=like.device) for name, empty in ALONG_PATH.items()}

    def _table(self, values: Tensor, empty: float) -> Tensor:
        """Reshape values ``[M]`` of the beams to ``[n, k]``."""
        out = torch.full((self.n, self.k), empty, dtype=values.dtype, device=values.device)
        out[self.problem, self.beam] = values
        return out

    def _of_problems(self, values: Tensor, empty: float) -> Tensor:
        """Scatter values of the live problems into those of all problems, ``[n, ...]``."""
        if len(values) == self.n:
            return values
        out = torch.full((self.n, *values.shape[1:]), empty, dtype=values.dtype, device=values.device)
        out[self._live_there] = values
        return out
