"""The logic of ``ttcfast run_ttc``: loads a surrogate and trajectories, evaluates every method and writes the results."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ttcfast.checks import at_least, one_of
from ttcfast.core.base_fm import Surrogate
from ttcfast.data import ReadOptions, TrajectorySet
from ttcfast.evaluation.breakeven import equal_error_notes
from ttcfast.evaluation.calibration import candidate_scores
from ttcfast.evaluation.evaluate import Evaluation, Problems, evaluate, evaluate_method, forms_of, method_names
from ttcfast.evaluation.frontier import Frontier, trace_frontier
from ttcfast.evaluation.methods import BLEND, Variant, named_variants, search_name, search_options, variants
from ttcfast.evaluation.reading import read_problems
from ttcfast.evaluation.results import MethodResult
from ttcfast.evaluation.solvers import with_solver_rows
from ttcfast.evaluation.speeds import FRAMES, grid_of_equal_error, measure_speeds
from ttcfast.evaluation.sweep import Sweep, runs_needed, sweep_branching
from ttcfast.evaluation.table import print_table
from ttcfast.models import load_surrogate
from ttcfast.models.ensemble import SolverStep
from ttcfast.models.factory import check_one_model, name_of_model, open_surrogate, provenance_of
from ttcfast.models.grid_solvers import GridSolver, StepSolver, solver_of
from ttcfast.models.on_grid import require_directions_fit, require_fit, units_of_data
from ttcfast.models.quality import one_step_error
from ttcfast.report.outputs import log_outputs, write_breakeven, write_calibration, write_frontier, write_outputs
from ttcfast.report.recorded import ROWS, read_recorded, read_rows, write_recorded
from ttcfast.rewards.arm import ARMScorer
from ttcfast.rewards.composition import ScorerList
from ttcfast.rewards.prm.scorer import PRMScorer
from ttcfast.rewards.residual import EulerResidualScorer, VorticityResidual
from ttcfast.rewards.scorer import Scorer
from ttcfast.runtime import provenance
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.logs import RunLog
from ttcfast.runtime.progress import Bar, bar
from ttcfast.runtime.units import time_step_of
from ttcfast.spec import ARMWeights, EulerSpec, Momentum, Scale, StateSpec, TTCConfig
from ttcfast.ttc.beam import check_select


@dataclass(frozen=True)
class RunTTCConfig:
    """Configuration of one evaluation of test-time computing.

    Args:
        checkpoint: The surrogate, a file of ``ttcfast train_fm``; None with a factory.
        data: Trajectory files, or folders of them, in this order.
        split: Split of the data, as in ``open_trajectories``; None takes all.
        reading: Format of the files, and what it leaves open.
        factory: Function of one's own that returns the surrogate, ``"package.module:function"``, in place of a checkpoint.
        args: Its keyword arguments.
        out: Folder for all output.
        problems: Number of trajectories; None takes all.
        steps: T, steps to roll out. Errors end with the data.
        ttc: B, noise, random seed and guardrails. ``project`` is the projection of the rows that have one, None that onto totals. A
            search over several beams or with lookahead requires ``select="argmax"``.
        arm: Weights of the analytical reward.
        momentum, scale: How the analytical reward measures, see
            docs/design/decisions.md ("Momentum penalty" and "Absolute and relative penalties").
        prm: A learned reward of ``ttcfast train_prm``, for the rows PRM, ARM + PRM (the sum of their z-scores), PRM refined, the
            corrector alone, the corrector under every symmetry, and that of the surrogate's mean with a classical solver.
        reward: ``"arm"`` or ``"prm"``, the plan's switch; None follows ``prm``. ``"prm"`` requires one, ``"arm"`` forbids it.
        methods: Run only these rows, named as in ``methods.variants`` (``"prm_span"``), ``BASELINES`` and ``ORACLES``, or
            ``"finetuned"``, ``"solver"`` and ``"surrogate_solver"``, and the deterministic rollout. None runs all but the uses of a reward
            that cost extra.
        merge: Folders of runs on the same problems, whose rows are copied instead of being run again.
        oracle: Run the choice by true error, the ceiling.
        projection: Run every method with projection, too; None does so where the layout declares what it imposes.
        sweep: Branching factors to sweep; () skips the sweep.
        sweep_problems: Number of problems of the sweep.
        sweep_methods: Lines of the sweep: ``"mean"``, ``"oracle"`` or rows with a reward; None takes all of the table.
        sweep_projection: Sweep with projection, too, at twice the cost.
        frontier: Model evaluations per problem and step at which the searches are compared; () skips the comparison.
        frontier_problems: Number of problems of the frontier.
        search_candidates: B of each beam in the rows of a search over several beams; None takes that of ``ttc``.
        search_projected: Run the rows of rewards, searches and symmetries only with projection, where the domain conserves its totals.
        resume: Keep the state of every rollout with a reward in ``out/resume``, and continue from the states found there.
        horizons: Steps of the table's error columns; those beyond T are left out.
        shown: Problems whose fields are drawn.
        finetuned: Checkpoint of the same surrogate fine-tuned on the reward split, evaluated in rows of its own.
        solvers: Cells per axis of the classical solver's rows, for a gas and for Kolmogorov flow. ``"auto"`` takes the model's grid, one of
            half as many cells per axis, and the finest that takes no longer than the deterministic surrogate; () leaves the rows out.
        breakeven: Batch sizes at which a frame of the deterministic surrogate and one of the solver are timed, on the model's grid, on half
            and on twice as many cells per axis; () skips it.
        one_step: Also compare single steps of the surrogate with persistence, at N T further model evaluations.
        calibration: Number of true states whose candidates' scores are compared with their true errors, at B model evaluations each.
        recorded: File of rows that another run measured on the same problems.
        device: Device of the surrogate: ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.
        tensorboard: Also log to TensorBoard.
        wandb: Also log to Weights & Biases: a project name (offline) or arguments of ``wandb.init``.
    """

    checkpoint: str | None
    data: tuple[str, ...]
    split: str | None = None
    reading: ReadOptions = field(default_factory=ReadOptions)
    factory: str | None = field(default=None, kw_only=True)
    args: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    out: str = "runs/ttc"
    problems: int | None = None
    steps: int = 20
    ttc: TTCConfig = field(default_factory=TTCConfig)
    arm: ARMWeights = field(default_factory=ARMWeights)
    momentum: Momentum = "components"
    scale: Scale = "relative"
    prm: str | None = None
    reward: Literal["arm", "prm"] | None = None
    methods: tuple[str, ...] | None = None
    merge: tuple[str, ...] = ()
    oracle: bool = True
    projection: bool | None = None
    sweep: tuple[int, ...] = ()
    sweep_problems: int = 4
    sweep_methods: tuple[str, ...] | None = None
    sweep_projection: bool = False
    frontier: tuple[int, ...] = ()
    frontier_problems: int = 4
    search_candidates: int | None = None
    search_projected: bool = False
    resume: bool = False
    horizons: tuple[int, ...] = (1, 4, 16, 20, 64, 128)
    shown: tuple[int, ...] = (0,)
    solvers: tuple[int, ...] | str = "auto"
    breakeven: tuple[int, ...] = ()
    one_step: bool = False
    calibration: int = 32
    finetuned: str | None = None
    recorded: str | None = None
    device: str = "cpu"
    tensorboard: bool = False
    wandb: str | Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        check_one_model(self.checkpoint, self.factory, self.args)
        at_least("steps", self.steps, 1)
        at_least("sweep_problems", self.sweep_problems, 1)
        at_least("calibration", self.calibration, 0)
        at_least("frontier_problems", self.frontier_problems, 1)
        if isinstance(self.solvers, str):
            one_of("solvers", self.solvers, ("auto",))
        for name in ("sweep", "horizons", "frontier", "breakeven", *(["solvers"] if self.solvers != "auto" else [])):
            for value in getattr(self, name):
                at_least(name, value, 1)
        if self.breakeven and self.solvers == ():
            raise ValueError(
                f"breakeven is {list(self.breakeven)} and solvers is empty; give eval.solvers=auto, or grids, for a solver to compare"
            )
        if self.problems is not None:
            at_least("problems", self.problems, 1)
        if search_options(self.ttc) is not None:
            check_select(self.ttc)
        if self.reward == "prm" and self.prm is None:
            raise ValueError("prm is null and use_prm is true (reward.type=prm); give prm.ckpt=<a folder that ttcfast train_prm wrote>")
        if self.reward == "arm" and self.prm is not None:
            raise ValueError(f"prm is {self.prm} and use_prm is false (reward.type=arm), which contradict each other; give one of them")

    @property
    def rows(self) -> list[str] | None:
        """``methods`` that are choices among candidates or baselines; None for all."""
        return None if self.methods is None else [name for name in self.methods if name not in ("finetuned", "solver")]

    @property
    def solves(self) -> bool:
        """Whether the rows of a classical solver, or some that combine it with the surrogate, or its seconds, are wanted."""
        named = self.methods is None or self.solvers != "auto" or any("solver" in name for name in self.methods)
        return (named or bool(self.breakeven)) and self.solvers != ()

    def forms(self, problems: Problems) -> tuple[bool, ...]:
        """Whether rows are projected: without projection, or without and with."""
        return (False, True) if (problems.can_project(self.ttc.project) if self.projection is None else self.projection) else (False,)


@dataclass(frozen=True, eq=False)
class RunTTCResult:
    """What a run measured and wrote.

    Args:
        evaluation: All methods.
        sweep: Methods over several B; None without a sweep.
        figures: Paths of the figures.
        seconds: Wall-clock time of the whole run.
    """

    evaluation: Evaluation
    sweep: Sweep | None
    figures: tuple[Path, ...]
    seconds: float


def run_ttc(
    config: RunTTCConfig,
    scorers: Mapping[str, Scorer] | None = None,
    *,
    step: Callable[[Tensor], Tensor] | None = None,
    title: str | None = None,
    story: Callable[[Evaluation], Sequence[MethodResult]] | None = None,
    quiet: bool = False,
) -> RunTTCResult:
    """Evaluate every method, print the table, and write numbers, table, configuration, figures and logs to ``config.out``.

    Args:
        config: What to run.
        scorers: Further rewards by name, each with rows of its own.
        step: Classical solver of one's own, from states ``[N, C, *S]`` in physical units to those a frame later, in place of those here.
        title: Title of the printed table.
        story: Picks the rows that are printed; None prints all. All are written.
        quiet: Print nothing.

    Raises:
        OutputError: The folder cannot be written.
        DataError: The data cannot be read, or hold too few trajectories.
        CheckpointError: The checkpoint is missing, damaged or of another architecture.
        ArgumentError: The device does not exist, or the factory does not return a surrogate (``open_surrogate``).
    """
    start = time.perf_counter()
    out = output_folder(config.out)
    device = device_of(config.device)
    surrogate = open_surrogate(config.checkpoint, config.factory, config.args, device=device)
    trained, name = surrogate.spec, name_of_model(config.checkpoint, config.factory)
    where: dict[str, Any] = {"count": config.problems, "split": config.split, "reading": config.reading, "checkpoint": name}
    problems, source = read_problems(surrogate, config.data, config.steps, shown=config.shown, **where)
    _require_units(config, source, surrogate)
    solver, unsolved = _solver(config, problems, source, step)
    surrogate.spec = problems.spec  # the data say which domain this is, and with it whether conservation may be imposed
    member = None if solver is None else SolverStep(solver, problems.spec)
    used = _methods(config, problems, source, scorers or {}, member, device)
    if solver is not None and solver.compiled and any(variant.model is not None for variant in used.values()):
        solver.step(problems.truth[:, 0].to(device))  # compiled for this batch before a clock runs
    resume = out / "resume" if config.resume else None
    with RunLog(out, config.tensorboard, config.wandb) as log, bar(4, "stages") as stages:
        with bar(_work(config, surrogate, problems, used), "run_ttc") as progress:
            evaluation, sweep = _measure(config, surrogate, problems, used, progress, resume)
            frontier = _frontier(config, surrogate, problems, used, evaluation, progress)
        stages.advance(note="classical solver")
        horizons = [h for h in config.horizons if h <= config.steps]
        evaluation = _solved(config, problems, solver, evaluation)
        compiled = solver is not None and solver.compiled
        evaluation = evaluation.adding(notes=equal_error_notes(evaluation, horizons, compiled=compiled))
        measured = [r for r in evaluation.results if r.recorded is None and r.method != "persistence"]
        write_recorded(out / ROWS, measured, problems, {"note": f"measured by the run in {config.out}"})
        stages.advance(note="calibration of the rewards")
        calibrated = _calibrate(config, surrogate, problems, used, out)
        evaluation = evaluation.adding(notes=[*_data_notes(source, trained), *unsolved])
        if config.one_step:
            evaluation = evaluation.adding(notes=[_one_step_note(surrogate, problems, evaluation)])
        speeds = None
        if config.breakeven and solver is not None:
            speeds = measure_speeds(surrogate, problems, solver, config.breakeven, grid_of_equal_error(evaluation, horizons))
            evaluation = evaluation.adding(notes=[*speeds.sentences(), *speeds.notes])
        write_breakeven(out, speeds)
        about = {**provenance.record(config), **provenance_of(surrogate)}
        stages.advance(note="figures")
        paths = write_outputs(out, evaluation, sweep, horizons, about, times=source.times[surrogate.history - 1 :])
        paths += [*calibrated, *write_frontier(out, frontier)]
        log_outputs(log, evaluation, paths)
        stages.advance()
    if not quiet:
        print_table(evaluation, horizons, title, only=None if story is None else story(evaluation))
    return RunTTCResult(evaluation, sweep, tuple(paths), time.perf_counter() - start)


def _require_units(config: RunTTCConfig, source: TrajectorySet, surrogate: Surrogate) -> None:
    """Raise ``DataError`` unless directions, learned reward and further surrogate are for the time step and cells of the data."""
    require_directions_fit(source, config.ttc.stochastic or surrogate.stochastic)
    if config.prm is not None:
        PRMScorer(config.prm).require_fit(units_of_data(source), f"the reward model {config.prm}")
    if config.finetuned is not None:
        require_fit(source, load_surrogate(config.finetuned), config.finetuned)


def _solver(
    config: RunTTCConfig, problems: Problems, source: TrajectorySet, step: Callable[[Tensor], Tensor] | None
) -> tuple[GridSolver | None, list[str]]:
    """Return the solver of the rows that are wanted, or None and, where no grid was asked for by number, a note that says why."""
    if not config.solves:
        return None, []
    try:
        own = None if step is None else StepSolver(step, source.shape)
        work = len(problems.truth) * problems.steps + FRAMES * sum(config.breakeven)
        solver = own or solver_of(source, problems.spec, work)
        solver.check([] if isinstance(config.solvers, str) else config.solvers)
    except ArgumentError as error:
        if config.solvers != "auto":
            said = str(error) if "eval.solvers" in str(error) else f"eval.solvers is {list(config.solvers)}: {error}"
            raise ArgumentError(said) from error
        return None, [f"No row of a classical solver: {error}."]
    return solver, []


def _solved(config: RunTTCConfig, problems: Problems, solver: GridSolver | None, evaluation: Evaluation) -> Evaluation:
    """Add the rows of the solver below the deterministic rollout."""
    wanted = config.methods is None or "solver" in config.methods or config.solvers != "auto"
    if solver is None or not wanted:
        return evaluation
    cells = None if isinstance(config.solvers, str) else config.solvers
    return with_solver_rows(evaluation, problems, solver, cells, device=device_of(config.device))


def _data_notes(source: TrajectorySet, trained: StateSpec) -> list[str]:
    """Return notes on how the data differ from those the surrogate was trained on."""
    notes = []
    own = source.files[0].spec
    if source.layout is not None and isinstance(own, EulerSpec):
        notes.append(
            f"The data hold {own.variables} variables; they were converted to the surrogate's, with the energy "
            + ("stored in the files." if own.energy is not None else "of the pressure.")
        )
    gammas = [] if source.spec.gamma is None else sorted({round(g, 6) for g in torch.as_tensor(source.spec.gamma).reshape(-1).tolist()})
    if any(abs(g - float(trained.gamma)) > 1e-4 for g in gammas):
        notes.append(f"The data have gamma {', '.join(f'{g:g}' for g in gammas)}; the surrogate was trained with {float(trained.gamma):g}.")
    return notes


_UNMOVED = {"refine_steps": 0, "select": "argmax"}


def _methods(
    config: RunTTCConfig,
    problems: Problems,
    source: TrajectorySet,
    more: Mapping[str, Scorer],
    solver: SolverStep | None,
    device: torch.device,
) -> dict[str, Variant]:
    """Return the variant of each row with a reward, by name."""
    arm = ARMScorer(config.arm, None, spec=problems.spec, momentum=config.momentum, scale=config.scale)
    rewards: dict[str, Scorer] = {"arm": arm}
    if config.prm is not None:
        prm = PRMScorer(config.prm, spec=problems.spec).to(device)
        rewards |= {"prm": prm, "arm_prm": ScorerList({"arm": arm, "prm": prm}, zscore=True, ndim=problems.spec.ndim)}
    if (residual := _residual(problems.spec, source)) is not None:
        rewards["residual"] = residual.to(device)
    rewards |= more
    options: Any = {"search_candidates": config.search_candidates, "search_projected": config.search_projected, "solver": solver}
    known = variants(rewards, config.ttc, spec=problems.spec, **options)
    if config.methods is None:
        plain = [name for name in rewards if name != "residual"]  # it is a row, and leads no search
        searched = [] if search_options(config.ttc) is None else [f"{name}_{search_name(config.ttc)}" for name in plain]
        switched = config.ttc.refine_steps or config.ttc.select != "argmax"  # then the plain rows are not plain
        learned = [] if "prm" not in rewards else ["prm_corrector"] if switched else ["prm_corrector", "prm_refined"]
        turned = [name for name in ("symmetry_mean", "prm_symmetry", BLEND, "prm_solver") if name in known]
        if "residual" in rewards:
            known["residual"] = dataclasses.replace(known["residual"], options={**known["residual"].options, **_UNMOVED})
        first = [name for name in turned if name == "symmetry_mean"]
        last = [name for name in turned if name != "symmetry_mean"]
        return {name: known[name] for name in [*first, *learned[:1], *rewards, *searched, *learned[1:], *last]}
    give = {"give_reward": "give prm.ckpt=<folder>", "give_solver": "give eval.solvers=auto and data whose equations have one, or step="}
    return named_variants(config.methods, known, rewards=rewards, besides=("finetuned", "solver"), **give)


def _residual(spec: StateSpec, source: TrajectorySet) -> Scorer | None:
    """Return the reward without training by the equations of the data, for a gas and for Kolmogorov flow; None for others."""
    step, file = time_step_of(source.times), source.files[0]
    if step is None or spec.boundary_mask is not None:
        return None
    if isinstance(spec, EulerSpec) and len(spec.momentum) == spec.ndim and not torch.is_tensor(spec.cell_volume):
        return EulerResidualScorer(step, file.spacing, spec=spec, boundary=file.parameters.get("boundary"))
    parameters = [each.parameters for each in source.files]
    if any(p.get("system") != "kolmogorov" or p["kolmogorov"] != parameters[0]["kolmogorov"] for p in parameters):
        return None
    return VorticityResidual(step, **{name: value for name, value in parameters[0]["kolmogorov"].items() if name != "spin_up"})


def _measure(
    config: RunTTCConfig, surrogate: Surrogate, problems: Problems, used: Mapping[str, Variant], progress: Bar, resume: Path | None
) -> tuple[Evaluation, Sweep | None]:
    def report(result: MethodResult) -> None:
        progress.advance(result.evaluations, note=f"{result.name}, B = {result.branching_factor}")

    known, notes = [], []
    for folder in config.merge:
        rows, note = read_rows(folder, problems, config.ttc.branching_factor)
        known += rows
        notes.append(note)
    options: dict[str, Any] = {"oracle": config.oracle, "projection": config.projection, "methods": config.rows, "known": known}
    options["resume"] = resume
    evaluation = evaluate(surrogate, problems, used, config.ttc, report=report, **options).adding(
        notes=[*notes, *_reward_notes(config, used)]
    )
    sweep = None
    if config.sweep:
        few = min(config.sweep_problems, evaluation.problems)
        forms = (False, True) if config.sweep_projection and evaluation.projected_baseline is not None else (False,)
        swept = _swept(config, used)
        options = {"count": few, "projections": forms, "report": report}
        sweep = sweep_branching(surrogate, problems, swept.pop("scorers"), config.ttc, config.sweep, evaluation, **swept, **options)
    if (config.methods is not None and "finetuned" not in config.methods) or any(r.method == "finetuned" for r in known):
        return evaluation, sweep
    further, about = _further_rows(config, problems)
    return evaluation.adding(*further, notes=about), sweep


def _frontier(
    config: RunTTCConfig, surrogate: Surrogate, problems: Problems, used: Mapping[str, Variant], table: Evaluation, progress: Bar
) -> Frontier | None:
    """Trace every search with the table's rewards and with the truth."""
    if not config.frontier:
        return None
    rewards = {name: variant.scorer for name, variant in used.items() if name in ("arm", "prm")}

    def report(result: MethodResult) -> None:
        progress.advance(0, note=f"{result.name}, {result.evaluations} evaluations")

    count = min(config.frontier_problems, table.problems)
    return trace_frontier(surrogate, problems.first(count), rewards, config.ttc, config.frontier, oracle=config.oracle, report=report)


def _swept(config: RunTTCConfig, used: Mapping[str, Variant]) -> dict[str, Any]:
    """Return the arguments that name the lines of the sweep over B."""
    wanted, lines_known = (
        config.sweep_methods,
        ("mean", *(name for name in used if "symmetry" not in name and not name.endswith("_corrector")), "oracle"),
    )
    if wanted is None:
        wanted = tuple(name for name in lines_known if (name != "residual" if config.methods is None else name in config.methods))
    if unknown := [name for name in wanted if name not in lines_known]:
        raise ArgumentError(f"sweep_methods names {', '.join(unknown)}; here there are {', '.join(lines_known)}")
    lines = {"scorers": {name: used[name] for name in used if name in wanted}}
    return {**lines, "mean": "mean" in wanted, "oracle": "oracle" in wanted and config.oracle}


def _reward_notes(config: RunTTCConfig, used: Mapping[str, Variant]) -> list[str]:
    """Return notes on what the names of the rows with a reward leave open."""
    notes, ttc = [], config.ttc
    if config.prm is not None:
        both = " ARM + PRM: the sum of their z-scores over a step's candidates." if any("arm_prm" in name for name in used) else ""
        notes.append(f"PRM: the learned reward of {config.prm}.{both}")
    if ttc.refine_steps or any("refined" in name for name in used):
        lengths = " and ".join(f"{length:g}" for length in ttc.refine_lengths)
        which = "all rows with a reward" if ttc.refine_steps else "refined"
        notes.append(
            f"{which}: copies of every candidate, moved {lengths} of a full step along the reward, join the group, "
            f"{max(1, ttc.refine_steps)} times."
        )
    if any(name.endswith("_corrector") for name in used):
        notes.append(f"corrector alone: the deterministic step, moved {max(1, ttc.refine_steps)} times by a full step along the reward.")
    if "symmetry_mean" in used:
        notes.append(
            "mean over symmetries: of deterministic steps of the state turned, mirrored and shifted, each brought back; with a corrector, "
            "each is moved along the reward before that."
        )
    if BLEND in used:
        notes.append("mean of surrogate and solver: of the deterministic step and the solver's on the model's grid, at every step.")
    if any(name.endswith("_solver") and name != BLEND for name in used):
        notes.append("corrector, with solver: that mean under every symmetry, moved along the reward as the corrector is, and their mean.")
    if ttc.select != "argmax":
        notes.append(f"Rows with a reward take select={ttc.select} unless their name says otherwise.")
    return notes


def _calibrate(config: RunTTCConfig, surrogate: Surrogate, problems: Problems, used: Mapping[str, Variant], out: Path) -> list[Path]:
    """Measure and write the calibration of the rewards; return the paths of its figures."""
    rewards = {name: variant.scorer for name, variant in used.items() if "select" not in variant.options}
    found = None
    if rewards and config.calibration and config.ttc.branching_factor > 1:
        found = candidate_scores(surrogate, problems, rewards, config.ttc, groups=config.calibration)
    return write_calibration(out, found)


def finetuned_rows(checkpoint: str, problems: Problems, config: RunTTCConfig) -> list[MethodResult]:
    """Roll out another checkpoint deterministically, without projection and, if the run projects, with it."""
    other = load_surrogate(checkpoint).to(device_of(config.device))
    other.spec = problems.spec
    rows = [evaluate_method("deterministic", other, problems, None, config.ttc, projected=p) for p in config.forms(problems)]
    return [dataclasses.replace(r, method="finetuned") for r in rows]


def _further_rows(config: RunTTCConfig, problems: Problems) -> tuple[Iterable[MethodResult], list[str]]:
    """Return the rows of the fine-tuned surrogate, measured now or recorded, with notes; nothing if there are none."""
    if config.finetuned is not None:
        return finetuned_rows(config.finetuned, problems, config), [
            f"fine-tuned surrogate: the deterministic rollout of {config.finetuned}."
        ]
    if config.recorded is not None and Path(config.recorded).exists():
        rows, note = read_recorded(config.recorded, problems)
        return rows, [f"recorded: {note}"]
    missing = f"The row of the surrogate fine-tuned on the reward split is left out: {config.recorded} is not there."
    return [], [missing] if config.recorded is not None else []


def _one_step_note(surrogate: Surrogate, problems: Problems, evaluation: Evaluation) -> str:
    truth = problems.truth if problems.before is None else torch.cat([problems.before, problems.truth], 1)
    error = one_step_error(surrogate, truth.to(next((p.device for p in surrogate.parameters()), torch.device("cpu"))))
    finite = int(evaluation.baseline.mse.isfinite().all(1).sum())
    return (
        f"One deterministic step along the truth: relative L1 {100 * error.surrogate:.2f} %; copying the last frame: "
        f"{100 * error.persistence:.2f} % ({error.persistence / error.surrogate:.1f} times as much). "
        f"The deterministic rollout is finite on {finite} of {len(truth)} trajectories."
    )


def _work(config: RunTTCConfig, surrogate: Surrogate, problems: Problems, used: Mapping[str, Variant]) -> int:
    """Count the model evaluations of the run, apart from resampling and merged rows."""
    n = len(problems.truth)
    names = method_names(used, config.ttc, oracle=config.oracle, methods=config.rows)
    forms = config.forms(problems)
    own = {name: dataclasses.replace(config.ttc, **used[name].options) if name in used else config.ttc for name in names}
    costs = [1 if name in ("deterministic", "random") else c.branching_factor * c.beam_width * (1 + c.lookahead) for name, c in own.items()]
    table = n * config.steps * sum(cost * len(forms_of(used.get(name), forms)) for name, cost in zip(names, costs))
    lines = _swept(config, used)
    swept = sum(runs_needed(lines.pop("scorers"), config.sweep, config.ttc, surrogate, **lines))
    return table + min(config.sweep_problems, n) * config.steps * swept * (len(forms) if config.sweep_projection else 1)
