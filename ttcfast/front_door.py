"""The short way in: load a model or a reward, improve a rollout, evaluate on problems with known truth.

Everything here is a few calls of the classes behind it (``Surrogate``, ``TTCGreedy``, ``TTCBeam``, ``evaluation.evaluate``), whose
further settings ``**config`` reaches by the field names of ``TTCConfig``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttcfast.core.base_fm import Surrogate
from ttcfast.evaluation.evaluate import Evaluation, Problems
from ttcfast.evaluation.evaluate import evaluate as evaluate_methods
from ttcfast.evaluation.methods import BLEND, ONE_BEAM, Variant, named_variants, search_name, search_options, variants
from ttcfast.evaluation.reading import read_problems
from ttcfast.evaluation.solvers import with_solver_rows
from ttcfast.models.checkpoint import surrogate_of
from ttcfast.models.ensemble import Blend, Ensemble, SolverStep, with_spec
from ttcfast.models.grid_solvers import GridSolver, StepSolver
from ttcfast.models.on_grid import require_fit, units_of_data
from ttcfast.rewards.arm import ARMScorer
from ttcfast.rewards.prm.scorer import PRMScorer
from ttcfast.rewards.residual import EulerResidualScorer
from ttcfast.rewards.scorer import Scorer, as_scorer
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.units import Units
from ttcfast.searches import Refine, Search
from ttcfast.spec import StateSpec, TTCConfig
from ttcfast.ttc.beam import TTCBeam
from ttcfast.ttc.budget import Budget
from ttcfast.ttc.inference import TTCGreedy
from ttcfast.ttc.result import RolloutResult

if TYPE_CHECKING:
    from ttcfast.pwm import PWM

SHIPPED = {"surrogate": "surrogate.safetensors", "prm": "prm"}


def improve(
    model: Any,
    x0: Tensor,
    T: int,
    *,
    spec: StateSpec | None = None,
    reward: Any = None,
    branching_factor: int = 8,
    search: str | Search = "greedy",
    refine: int | Refine = 0,
    project: str | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    **config: Any,
) -> RolloutResult:
    """Roll a model out from ``x0``, spending compute at every step on a better next state.

    Args:
        model: A ``Surrogate``; an ``Ensemble`` or ``Blend`` of some and of classical solvers; any ``nn.Module`` from a state to the next
            one, together with ``spec``; or an object with the plan's ``sample_next(x_t, seed=None, multi=False)``.
        x0: Initial states ``[C, *S]`` or ``[N, C, *S]`` in physical units, with history ``[h, C, *S]`` or ``[N, h, C, *S]``.
        T: Number of steps, at least 1.
        spec: Layout of the states. Needed for a plain module; otherwise the model's own is used.
        reward: A ``Scorer``, any callable ``score(x_t, candidates)`` that returns one number per candidate (higher is better), or a path
            for ``load``. ``"residual"`` scores a gas by the Euler equations over the model's time step, on cubic cells of the spec's
            volume (``EulerResidualScorer``). None scores by conservation, boundary and positivity (``ARMScorer``). A module is moved to
            the model's device.
        branching_factor: Candidates per step (and per beam), including the deterministic step.
        search: ``"greedy"``, or an object such as ``Beam(width=4)``.
        refine: Moves of every candidate along a differentiable reward: a number, or a ``Refine``.
        project: ``"conservation"`` removes the mean residual of every conserved variable from the chosen states.
        budget: Limit on model evaluations or seconds.
        seed: Random seed of the candidates.
        **config: Further fields of ``TTCConfig``, such as ``stochastic`` or ``memory_budget``.

    Returns:
        The trajectory, in the layout of ``x0`` with time as in ``TTCGreedy.rollout``, with scores, choices, interventions and cost.

    Raises:
        ValueError: An argument that is out of range or that the model or the search does not have.
        TypeError: A model that cannot be rolled out.
        DeterministicModelError: A model whose candidates are all alike.
    """
    model = _rollable(model, spec)
    own = spec if spec is not None else getattr(model, "spec", None)
    options = _options(branching_factor=branching_factor, search=search, refine=refine, project=project, seed=seed, **config)
    controller = TTCGreedy if options.approach == "greedy" and not options.lookahead else TTCBeam
    rollout = controller(model, _reward(reward, own, model), options).rollout
    return rollout(x0, T, return_info=True, budget=budget)


def load(what: str | os.PathLike[str]) -> Surrogate | PRMScorer | PWM:
    """Load a surrogate, a learned reward, a world model or an agent.

    Args:
        what: ``"surrogate"`` or ``"prm"`` for those in ``examples/`` of a checkout; a ``.safetensors`` file that ``ttcfast train_fm``
            wrote; or a reward model, a folder of ``ttcfast train_prm`` or a ``.pt`` file of the plan's sketch; or a ``.safetensors`` file
            of ``ttcfast train_wm`` or ``train_policy``. Only tensors are read.

    Raises:
        CheckpointError: The file is missing, damaged or holds another kind of model.
        ArgumentError: A shipped model is asked for and there is no ``examples/`` folder.
    """
    path = Path(what) if str(what) not in SHIPPED else examples() / SHIPPED[str(what)]
    if path.is_dir() or path.suffix == ".pt":
        return PRMScorer(path)
    tensors, meta = checkpoints.load(path)
    if (kind := meta.get("architecture")) in ("world_model", "agent"):
        from ttcfast.pwm.checkpoint import agent_of, world_model_of

        return (agent_of if kind == "agent" else world_model_of)(tensors, meta, path)
    return surrogate_of(tensors, meta, path)


def evaluate(
    model: Surrogate | Ensemble | Blend | SolverStep,
    problems: Problems | str | os.PathLike[str] | Sequence[str],
    rewards: Mapping[str, Any] | None = None,
    *,
    steps: int = 20,
    count: int | None = None,
    split: str | None = None,
    branching_factor: int = 8,
    search: str | Search = "greedy",
    refine: int | Refine = 0,
    oracle: bool = True,
    projection: bool | None = None,
    methods: Sequence[str] | None = None,
    solver: GridSolver | Callable[..., Tensor] | None = None,
    seed: int = 0,
    **config: Any,
) -> Evaluation:
    """Compare rewards, searches and every baseline on problems with known truth.

    Args:
        model: The surrogate, or an ``Ensemble`` or ``Blend``, on the device to run on.
        problems: ``Problems``, or trajectory files or folders to read them from.
        rewards: Rewards by name, each as ``improve`` takes it. None evaluates ``{"arm": ARMScorer}``.
        steps, count, split: Steps to roll out, number of trajectories (None for all) and split, where ``problems`` are read from files.
        branching_factor, search, refine, seed, config: As in ``improve``. A beam search and a refinement get rows of their own beside the
            plain ones.
        oracle: Add the choice by true error, the ceiling of choosing.
        projection: Run every method with conservation imposed, too. None does so where the domain conserves its totals.
        methods: Only these rows, by the names that ``ttcfast run_ttc`` has for them, beside persistence and the deterministic rollout:
            ``"<name>_corrector"`` (the corrector alone), ``"symmetry_mean"``, ``"<name>_symmetry"`` (the corrector under every symmetry)
            and all others of ``evaluation.methods.variants``. None runs every reward's choice and the baselines.
        solver: A classical solver, for rows of its own (``"solver"`` in ``methods``), of its mean with the model
            (``"surrogate_solver"``), of that mean corrected by a learned reward (``"<name>_solver"``), and for those that ``methods`` names
            (``"<name>_solver_choice"``, ``"<name>_solver_span"``): a function from states ``[M, C, *S]`` to those a frame later, or a
            ``GridSolver``.

    Returns:
        All rows; ``print(result.table())`` shows them.

    Raises:
        DataError: Files that cannot be read, or of another grid, time step or cell than the model's or a learned reward's.
        ArgumentError: ``methods`` names a row that is unknown, or whose reward, moves, symmetries or solver are missing.
        ValueError: As in ``improve``.
    """
    if not callable(getattr(model, "candidates", None)) or not isinstance(getattr(model, "spec", None), StateSpec):
        raise TypeError(f"model is a {type(model).__name__}; wrap it: ttcfast.Surrogate(model, spec)")
    time_step = getattr(model, "time_step", None)
    if isinstance(problems, Problems):
        given, units = problems, Units("the model", time_step)
    else:
        given, units = _read(model, problems, steps, count=count, split=split)
    model = with_spec(model, given.spec)  # the data say which domain this is, and with it whether conservation may be imposed
    options = _options(branching_factor=branching_factor, search=search, refine=refine, seed=seed, **config)
    wanted = {"arm": None} if rewards is None else rewards
    scorers = {name: as_scorer(_reward(reward, given.spec, model), ndim=given.spec.ndim) for name, reward in wanted.items()}
    for name, scorer in scorers.items():
        for part in scorer.modules():
            if isinstance(part, PRMScorer):
                part.require_fit(units, f"the reward model {name}")
    grids = None if solver is None else _on_grids(solver, given)
    rows = _rows(scorers, options, given, grids, methods)
    if grids is not None and grids.compiled:
        grids.step(given.truth[:, 0].to(_device(model)))  # compiled for this batch before a clock runs
    named = None if methods is None else [name for name in methods if name != "solver" or grids is None]
    found = evaluate_methods(model, given, rows, options, oracle=oracle, projection=projection, methods=named)
    if grids is None or (methods is not None and "solver" not in methods):
        return found
    return with_solver_rows(found, given, grids, device=_device(model))


def examples(given: str | os.PathLike[str] | None = None) -> Path:
    """The folder given, or else ``examples/`` of the checkout that this code lies in or of the working directory.

    Raises:
        ArgumentError: There is no such folder.
    """
    places = [Path(given)] if given is not None else [Path(__file__).resolve().parents[1] / "examples", Path("examples")]
    for place in places:
        if place.is_dir():
            return place
    raise ArgumentError(f"no folder {' or '.join(map(str, places))}; run from a checkout of ttcfast or give examples=<folder>")


def _read(model: Any, problems: Any, steps: int, *, count: int | None, split: str | None) -> tuple[Problems, Units]:
    """Read problems from files, and the files' time step and cell.

    Errors are in units of the model's training data; of several models, of the one that sees the most frames.
    """
    surrogates = [model] if isinstance(model, Surrogate) else getattr(model, "surrogates", [])
    if not surrogates:
        raise TypeError(f"problems is {problems!r} and model a {type(model).__name__}, which names no training data; give Problems(...)")
    first = max(surrogates, key=lambda each: each.history)
    found, source = read_problems(first, str(problems) if isinstance(problems, os.PathLike) else problems, steps, count=count, split=split)
    for each in surrogates:
        require_fit(source, each, "the model")
    return found, units_of_data(source)


def _on_grids(solver: Any, problems: Problems) -> GridSolver:
    shape = tuple(problems.truth.shape[3:])
    if isinstance(solver, GridSolver):
        if solver.shape != shape:
            sizes = [" x ".join(map(str, cells)) for cells in (solver.shape, shape)]
            raise ValueError(f"solver is for states of {sizes[0]} cells and the problems have {sizes[1]}; give one made for these problems")
        return solver
    if not callable(solver):
        raise TypeError(
            f"solver is a {type(solver).__name__}; give a function from states [M, C, *S] to those a frame later, or a GridSolver"
        )
    return StepSolver(solver, shape)


def _device(model: Any) -> torch.device | None:
    return next((p.device for p in model.parameters()), None) if isinstance(model, nn.Module) else None


def _options(**given: Any) -> TTCConfig:
    known = [f.name for f in dataclasses.fields(TTCConfig)]
    if unknown := sorted(set(given) - {*known, "search", "refine"}):
        raise TypeError(f"unknown arguments {', '.join(unknown)}; there are also the fields of TTCConfig: {', '.join(known)}")
    return TTCConfig(**given)


def _rollable(model: Any, spec: StateSpec | None) -> Any:
    """The model as a controller takes it: a plain module becomes a ``Surrogate``."""
    complete = callable(getattr(model, "candidates", None)) or callable(getattr(model, "sample_next", None))
    if complete or not isinstance(model, nn.Module):
        return model  # whether it can be rolled out, the controller says
    if spec is None:
        raise ValueError(f"spec is None and model is a plain {type(model).__name__}; give spec=, the layout of its states, as a StateSpec")
    return Surrogate(model, spec)


def _reward(reward: Any, spec: StateSpec | None, model: Any) -> Any:
    """What ``improve`` takes as a reward, opened, and on the model's device."""
    time_step, device = getattr(model, "time_step", None), _device(model)
    if reward is None:
        if spec is None:
            raise ValueError("reward and spec are None; give a reward, or spec= so that the states can be scored by conservation")
        return ARMScorer(spec=spec)
    if reward == "residual":
        if spec is None or time_step is None or isinstance(spec.cell_volume, Tensor):
            raise ValueError(
                "reward is 'residual' and the model does not say its time step, or its spec not one cell volume; set model.time_step, or "
                "give EulerResidualScorer(dt, cell, spec=spec)"
            )
        return EulerResidualScorer(time_step, spec.cell_volume ** (1 / spec.ndim), spec=spec)
    if isinstance(reward, (str, os.PathLike)):
        reward = load(reward)
    if isinstance(reward, Surrogate):
        raise ValueError("reward is a surrogate; give a reward model, a Scorer or a callable")
    return reward.to(device) if isinstance(reward, nn.Module) else reward


def _rows(
    rewards: Mapping[str, Scorer], config: TTCConfig, problems: Problems, solver: GridSolver | None, methods: Sequence[str] | None
) -> dict[str, Variant]:
    """The rows that ``methods`` names; without it every reward's plain choice, what ``config`` adds to it, and a solver's combinations."""
    step = None if solver is None else SolverStep(solver, problems.spec)
    plain = {**ONE_BEAM, "refine_steps": 0, "select": "argmax", "temperature": 1.0}
    known = variants(rewards, config, spec=problems.spec, solver=step)
    known |= {name: Variant(reward, plain) for name, reward in rewards.items()}
    if methods is not None:
        give = {
            "give_reward": "give rewards={name: reward}, such as load(path)",
            "give_solver": "give solver=, a function or GridSolver",
        }
        return named_variants(methods, known, rewards=rewards, besides=("solver",) if solver is not None else (), **give)
    added = ["refined"] if config.refine_steps else []
    added += [] if search_options(config) is None else [search_name(config)]
    added += {"argmax": [], "mean": ["mean"], "softmax_mean": ["softmax"], "span": ["span"]}[config.select]
    names = [*rewards, *(f"{name}_{use}" for use in added for name in rewards)]
    if solver is not None:
        names += [BLEND, *(f"{name}_solver" for name, reward in rewards.items() if isinstance(reward, PRMScorer))]
    return {name: known[name] for name in names}
