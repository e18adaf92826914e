"""Evaluates every method on the same problems: errors, gains, conservation and cost."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.checks import at_least
from ttcfast.core.base_fm import BaseFM
from ttcfast.core.context import window_at
from ttcfast.metrics import band_variances, conservation_drift, rollout_mse
from ttcfast.rewards.scorer import Scorer
from ttcfast.spec import EulerSpec, FieldSpec, StateSpec, TTCConfig
from ttcfast.ttc.models import as_source
from ttcfast.ttc.projection import check_projectable

from .baselines import BASELINES
from .methods import ORACLES, Variant, roll_method
from .results import Gain, MethodResult
from .table import print_table

HORIZONS = (1, 4, 16, 20, 64, 128)
"""Steps at which tables show the error, as far as a rollout goes."""

Report = Callable[[MethodResult], None]
"""Callback for progress bars and logs, called with the result of each method."""


@dataclass(frozen=True, eq=False)
class Problems:
    """Initial conditions, and the true trajectories that rollouts are compared with.

    Args:
        truth: ``[N, K+1, C, *S]`` in physical units; frame 0 is the initial condition.
        spec: Layout of a state.
        steps: T, steps to roll out. Errors end at step K, and so does the oracle, which needs the truth.
        scale: ``[C]``, units of the error, such as the standard deviations of the training data; None measures in physical units.
        shown: Problems whose trajectories are kept for figures.
        before: ``[N, h-1, C, *S]``, the frames before frame 0, for surrogates that see h frames; None for those that see one.

    Raises:
        ValueError: The truth has another layout or fewer than two frames, T is below 1, a problem to show does not exist, or the frames
            before do not fit the truth.
    """

    truth: Tensor
    spec: StateSpec
    steps: int
    scale: Tensor | None = None
    shown: tuple[int, ...] = (0,)
    before: Tensor | None = None

    def __post_init__(self) -> None:
        at_least("steps", self.steps, 1)
        if self.truth.ndim != self.spec.ndim + 3 or self.truth.shape[1] < 2:
            raise ValueError(
                f"truth has shape {tuple(self.truth.shape)}; expected [N, K+1, C, *S] with {self.spec.ndim} space axes, 2 frames or more"
            )
        self.spec.check_state("truth", self.truth[:, 0], channel_axis=1)
        if any(not 0 <= i < len(self.truth) for i in self.shown):
            raise ValueError(f"shown is {self.shown}; there are problems 0 to {len(self.truth) - 1}")
        n, _, *state = self.truth.shape
        if self.before is not None and [len(self.before), *self.before.shape[2:]] != [n, *state]:
            expected = ", ".join(map(str, [n, "h-1", *state]))
            raise ValueError(f"before has shape {tuple(self.before.shape)}; expected [{expected}], the frames before those of truth")

    @property
    def scored(self) -> int:
        """Number of steps with a known truth, min(T, K)."""
        return min(self.steps, self.truth.shape[1] - 1)

    @property
    def history(self) -> int:
        """Number of frames up to frame 0, the most that a surrogate may see."""
        return 1 if self.before is None else 1 + self.before.shape[1]

    def window(self, step: int, history: int) -> Tensor:
        """Return true states as a surrogate that sees ``history`` frames takes them at a step: ``[N, C, *S]`` or ``[N, h, C, *S]``.

        Raises:
            ValueError: It sees more frames than there are up to this step.
        """
        first = step + 1 - history
        if first >= 0:
            return window_at(self.truth, first, history)
        if self.before is None or -first >= self.history:
            raise ValueError(
                f"the problems have {self.history + step} frames up to step {step} and the surrogate sees {history}; give "
                f"Problems(before=...) of {history - 1} frames, or read them with read_problems for this surrogate"
            )
        return torch.cat([self.before[:, first:], self.truth[:, : step + 1]], 1)

    def error(self, trajectory: Tensor) -> Tensor:
        """Return the mean squared error ``[N, frames]`` of a trajectory over cells and the channels that a model predicts."""
        frames = min(trajectory.shape[1], self.truth.shape[1])
        found, truth = (self.spec.predicted(x[:, :frames], channel_axis=2) for x in (trajectory, self.truth))
        scale = None if self.scale is None else self.spec.predicted(self.scale, channel_axis=0)
        return rollout_mse(found, truth, scale=scale, ndim=self.spec.ndim)

    def variances(self, trajectory: Tensor) -> Tensor:
        """Return the variance ``[N, bands]`` of the last scored frame by scale, over the channels that a model predicts."""
        last = self.spec.predicted(trajectory[:, min(trajectory.shape[1] - 1, self.scored)], channel_axis=1)
        scale = last.new_ones(last.shape[1]) if self.scale is None else self.spec.predicted(self.scale, channel_axis=0).to(last)
        return band_variances(last / scale.reshape(-1, *[1] * self.spec.ndim), self.spec.ndim).sum(1)

    def can_project(self, kind: str | None = None) -> bool:
        """Whether the layout declares what this projection, by default that onto totals, imposes."""
        try:
            check_projectable(self.spec, kind or "conservation")
        except ValueError:
            return False
        return True

    def first(self, n: int) -> Problems:
        """Return the first ``n`` problems, keeping no trajectories."""
        gamma = self.spec.gamma
        spec = self.spec.replace(gamma=gamma[:n]) if torch.is_tensor(gamma) and gamma.ndim else self.spec
        before = None if self.before is None else self.before[:n]
        return dataclasses.replace(self, truth=self.truth[:n], spec=spec, shown=(), before=before)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Results of all methods on one set of problems.

    Args:
        results: One per method and projection, in the order of the table.
        problems: N.
        steps: T.
        scored: K, steps with a known truth.
        truth_drift: Drift of the truth itself over steps 0..K, as in ``MethodResult.drift``: the rounding of the data.
        persistence: ``[N, K+1]``, the error of copying step 0, in the units of the results.
        truth: ``[len(shown), K+1, C, *S]``, the truth of the problems whose trajectories were kept.
        shown: Indices of those problems.
        scale: ``[C]``, units of the error.
        notes: What a reader of the numbers must know.
        truth_variances: ``[N, bands]``, as in ``MethodResult.variances``.
        picture: The channel that figures and pages show, its name, and the lengths of the domain.
    """

    results: tuple[MethodResult, ...]
    problems: int
    steps: int
    scored: int
    truth_drift: dict[str, Tensor]
    persistence: Tensor
    truth: Tensor
    shown: tuple[int, ...]
    scale: Tensor | None = None
    notes: tuple[str, ...] = ()
    truth_variances: Tensor | None = None
    picture: tuple[int, str, tuple[float, ...] | None] = (0, "density", None)

    def __repr__(self) -> str:
        names = ", ".join(result.name for result in self.results)
        return f"Evaluation({self.problems} problems, {self.steps} steps: {names})"

    def table(self, horizons: Sequence[int] = HORIZONS) -> str:
        """Return the table that the commands print, as plain text, with the meaning of its columns.

        Args:
            horizons: Steps of the error columns; those beyond T are left out.
        """
        from rich.console import Console

        text = io.StringIO()
        print_table(self, [h for h in horizons if h <= self.steps], console=Console(file=text, force_terminal=False))
        return text.getvalue()

    @property
    def quantities(self) -> tuple[str, ...]:
        """Names of the conserved quantities whose drift is measured; () where nothing is conserved."""
        return tuple(self.truth_drift)

    @property
    def baseline(self) -> MethodResult:
        """The deterministic rollout, the reference of every gain."""
        return self.find("deterministic") or self.results[0]

    @property
    def rollouts(self) -> tuple[MethodResult, ...]:
        """The results but persistence, which figures leave out or draw as a reference; the first is the deterministic rollout."""
        return tuple(r for r in self.results if r.method != "persistence")

    @property
    def projected_baseline(self) -> MethodResult | None:
        """The deterministic rollout with projection, the second reference; None if there is none."""
        return self.find("deterministic", projected=True)

    def find(self, method: str, *, projected: bool = False) -> MethodResult | None:
        """Return the result of a method, or None."""
        return next((r for r in self.results if (r.method, r.projected) == (method, projected)), None)

    def gain(self, result: MethodResult) -> Gain:
        """Return the SampleGain over the deterministic rollout."""
        return Gain.of(result, self.baseline)

    def gain_over_projected(self, result: MethodResult) -> Gain | None:
        """Return the SampleGain over the deterministic rollout with projection, or None if there is none."""
        return None if self.projected_baseline is None else Gain.of(result, self.projected_baseline)

    def adding(self, *results: MethodResult, notes: Sequence[str] = (), after: str | None = None) -> Evaluation:
        """Return a copy with further rows, such as recorded ones, and notes appended.

        Args:
            results: The rows, at the end or, where ``after`` names a method, below its rows.
            notes: Sentences at the end of the notes.
            after: A method of the table.
        """
        place = max((i + 1 for i, r in enumerate(self.results) if r.method == after), default=len(self.results))
        rows = (*self.results[:place], *results, *self.results[place:])
        return dataclasses.replace(self, results=rows, notes=(*self.notes, *notes))


def evaluate(
    surrogate: BaseFM,
    problems: Problems,
    scorers: Mapping[str, Scorer | Variant],
    config: TTCConfig,
    *,
    oracle: bool = True,
    projection: bool | None = None,
    methods: Sequence[str] | None = None,
    known: Sequence[MethodResult] = (),
    report: Report | None = None,
    resume: Path | None = None,
) -> Evaluation:
    """Roll out and measure the baselines, the choice of every scorer and the choice by true error, below a row of persistence.

    Args:
        surrogate: The model, on the device to run on.
        problems: Initial conditions and the truth.
        scorers: What chooses among the B candidates, by method name (``"arm"``, ``"prm"``); a ``Variant`` also says how.
        config: B, noise, random seed and guardrails. ``project`` is the projection of the rows that have one, None that onto totals.
        oracle: Add the choice by true error, the ceiling of choosing, and that of the span if a method combines candidates in it.
        projection: Run every method with projection, too. None does so where the layout declares what it imposes.
        methods: Only these methods, and the deterministic rollout. None runs all.
        known: Rows measured on the same problems before, which are not run again.
        report: Called with each result.
        resume: Folder with a subfolder per method, from which interrupted rollouts continue; see ``roll_method``.

    Raises:
        ValueError: Projection on an open domain, an unknown method, or an argument that the controllers reject.

    Source: docs/design/decisions.md ("Honest baselines").
    """
    notes = []
    if projection is None:
        projection = problems.can_project(config.project)
        if not projection:
            gas = isinstance(problems.spec, EulerSpec)
            why = "the domain is open, its totals are not kept" if gas else "the layout declares nothing that is conserved"
            notes.append(f"Rows with projection are left out: {why}.")
    forms = (False, True) if projection else (False,)
    held = {(r.method, r.projected): r for r in (*known, _persistence(problems))}
    for name in method_names(scorers, config, oracle=oracle, methods=methods):
        for projected in forms_of(scorers.get(name), forms):
            if (name, projected) in held:
                continue
            folder = None if resume is None else resume / (f"{name}_projected" if projected else name)
            scorer = scorers.get(name)
            held[name, projected] = evaluate_method(name, surrogate, problems, scorer, config, projected=projected, resume=folder)
            if report is not None:
                report(held[name, projected])
    if problems.steps > problems.scored:
        notes.append(f"The truth ends at step {problems.scored} of {problems.steps}: errors and gains stop there, and so does the oracle.")
    order = ["persistence", *BASELINES, *scorers, *ORACLES]
    place = {name: i for i, name in enumerate(order)}
    return Evaluation(
        tuple(sorted(held.values(), key=lambda r: (place.get(r.method, len(place)), r.method, r.projected))),
        problems=len(problems.truth),
        steps=problems.steps,
        scored=problems.scored,
        truth_drift=conservation_drift(problems.truth[:, : problems.scored + 1], problems.spec),
        persistence=held["persistence", False].mse,
        truth_variances=problems.variances(problems.truth),
        truth=problems.truth[list(problems.shown), : problems.scored + 1],
        shown=problems.shown,
        scale=problems.scale,
        notes=tuple(notes),
        picture=_picture(problems),
    )


def forms_of(method: Scorer | Variant | None, forms: tuple[bool, ...]) -> tuple[bool, ...]:
    """Return which of ``forms`` (without and with projection) a method is run in."""
    alone = isinstance(method, Variant) and method.projected_alone and True in forms
    return (True,) if alone else forms


def method_names(
    scorers: Mapping[str, Scorer | Variant], config: TTCConfig, *, oracle: bool = True, methods: Sequence[str] | None = None
) -> list[str]:
    """Return the methods that ``evaluate`` runs, in the order of the table.

    Raises:
        ValueError: A method is unknown.
    """
    if methods is None:
        used = [s.options for s in scorers.values() if isinstance(s, Variant)]
        spans = config.select == "span" or any(options.get("select") == "span" for options in used)
        return [*BASELINES, *scorers, *(list(ORACLES)[: 1 + spans] if oracle else [])]
    everything = [*BASELINES, *scorers, *ORACLES]
    if unknown := [name for name in methods if name not in everything]:
        raise ValueError(f"methods names {', '.join(unknown)}; here there are {', '.join(everything)}")
    return [name for name in everything if name in methods or name == BASELINES[0]]


def evaluate_method(
    name: str,
    surrogate: BaseFM,
    problems: Problems,
    scorer: Scorer | Variant | None,
    config: TTCConfig,
    *,
    projected: bool = False,
    resume: Path | None = None,
) -> MethodResult:
    """Roll out one method on all problems and measure it.

    Args:
        name: ``"deterministic"``, ``"random"``, ``"mean"``, ``"oracle"``, ``"span_oracle"``, or the name of the scorer's method.
        scorer: What chooses among candidates; None for the five methods above.
        surrogate, problems, config: As in ``evaluate``.
        projected: Project at every step, by ``config.project`` or else onto the totals.
        resume: As in ``roll_method``.
    """
    config = dataclasses.replace(config, project=(config.project or "conservation") if projected else None)
    start = problems.window(0, as_source(surrogate, config).history)
    options: Any = {"start": start, "scale": problems.scale, "resume": resume}
    rolled = roll_method(name, surrogate, problems.truth, problems.steps, scorer, config, **options)
    own = dataclasses.replace(config, **scorer.options) if isinstance(scorer, Variant) else config
    trajectory, counts = rolled.trajectory.cpu(), rolled.interventions()
    scored = min(problems.scored, trajectory.shape[1] - 1) + 1
    return MethodResult(
        method=name,
        projected=projected,
        branching_factor=own.branching_factor if name not in ("deterministic", "random") else 1,
        beam_width=own.beam_width if isinstance(scorer, Variant) else 1,
        mse=problems.error(trajectory[:, :scored]),
        drift=conservation_drift(trajectory, problems.spec),
        seconds=rolled.seconds,
        evaluations=rolled.nfe,
        fallbacks=counts["fallbacks"],
        resamples=counts["resamples"],
        nonfinite=counts["nonfinite"],
        collapsed=counts["collapsed"],
        unprojected=counts["unprojected"],
        reward_evaluations=rolled.reward_evaluations if scorer is not None else 0,
        solver_steps=rolled.solver_steps,
        variances=problems.variances(trajectory),
        peak_bytes=rolled.peak_bytes,
        chunk_size=rolled.chunk_size,
        trajectory=trajectory[list(problems.shown)] if problems.shown else None,
    )


def _picture(problems: Problems) -> tuple[int, str, tuple[float, ...]]:
    """Return the channel that figures show, its name and the lengths of the domain: of a gas its density on equal cells, one unit in x."""
    spec, cells = problems.spec, problems.truth.shape[3:]
    if not isinstance(spec, FieldSpec):
        return (spec.density if isinstance(spec, EulerSpec) else 0), "density", tuple(n / cells[0] for n in cells)
    channel = next(c for c in range(len(spec.names)) if c not in spec.given_channels or len(spec.given_channels) == len(spec.names))
    return channel, spec.names[channel], tuple(h * n for h, n in zip(spec.distances, cells))


def _persistence(problems: Problems) -> MethodResult:
    """Return the row of frame 0, copied to every step."""
    still = problems.truth[:, :1].expand(-1, problems.steps + 1, *problems.truth.shape[2:])
    return MethodResult(
        method="persistence",
        projected=False,
        branching_factor=1,
        mse=problems.error(still[:, : problems.scored + 1]),
        drift=conservation_drift(still, problems.spec),
        seconds=0.0,
        evaluations=0,
        variances=problems.variances(still),
        trajectory=still[list(problems.shown)] if problems.shown else None,
    )
