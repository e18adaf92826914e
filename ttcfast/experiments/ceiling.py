"""The logic of ``ttcfast ceiling``: the gain of a choice by true error for each source of candidates.

No reward can choose better than the oracle among the same candidates, so a source with a low ceiling is not worth a reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ttcfast.checks import at_least, whole
from ttcfast.core.base_fm import Surrogate
from ttcfast.data import ReadOptions
from ttcfast.evaluation.evaluate import Problems, evaluate_method
from ttcfast.evaluation.reading import read_problems
from ttcfast.models.factory import check_one_model, name_of_model, open_surrogate, provenance_of
from ttcfast.models.on_grid import require_directions_fit
from ttcfast.runtime import provenance
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import output_folder, write_csv, write_json
from ttcfast.runtime.progress import Bar, bar
from ttcfast.spec import StochasticConfig, TTCConfig
from ttcfast.ttc.projection import project_conservation


@dataclass(frozen=True)
class CeilingConfig:
    """Configuration of a comparison of the oracle with the deterministic step, source by source.

    Args:
        checkpoint, factory, args, data, split, reading, problems, device: As in ``RunTTCConfig``.
        sources: What makes the candidates differ (``StochasticConfig``), by name; none means the surrogate's own noise, called ``own``.
        factors: Values of B, including the deterministic step.
        states: Steps of the truth from which single steps are compared; the groups of all B are nested.
        steps: Length of greedy rollouts by the oracle, at B evaluations per step and problem; 0 skips them.
        seed: Random seed of the candidates.
        out: Folder for ``ceiling.csv`` and ``ceiling.json``.
    """

    checkpoint: str | None
    data: tuple[str, ...]
    sources: Mapping[str, Any]
    split: str | None = "test"
    reading: ReadOptions = field(default_factory=ReadOptions)
    factory: str | None = field(default=None, kw_only=True)
    args: Mapping[str, Any] = field(default_factory=dict, kw_only=True)
    problems: int | None = 8
    factors: tuple[int, ...] = (5, 16)
    states: tuple[int, ...] = (0, 4, 8, 12)
    steps: int = 0
    seed: int = 0
    out: str = "runs/ceiling"
    device: str = "cpu"

    def __post_init__(self) -> None:
        check_one_model(self.checkpoint, self.factory, self.args)
        at_least("steps", self.steps, 0)
        if not self.factors:
            raise ValueError("factors is []; give some")
        for value in self.factors:
            whole("factors", value, 2)
        for value in self.states:
            whole("states", value, 0)


@dataclass(frozen=True)
class Ceiling:
    """One row: errors as ratios to the deterministic step without projection, means over problems.

    Args:
        source: Source of the candidates.
        branching_factor: B.
        projected: Whether states are projected before they are compared.
        one_step: Ratio of the oracle for single steps from the truth.
        deterministic_one_step: Ratio of the deterministic step (1 without projection).
        improved: Share of states in which some candidate beats the deterministic step, projected alike, by 0.1 %.
        rollout, deterministic_rollout: Ratios at the last step of a rollout; None without rollouts.
    """

    source: str
    branching_factor: int
    projected: bool
    one_step: float
    deterministic_one_step: float
    improved: float
    rollout: float | None
    deterministic_rollout: float | None


def ceiling(config: CeilingConfig) -> list[Ceiling]:
    """Measure every source and write the table.

    Raises:
        DataError: The data cannot be read.
        ArgumentError: The data hold fewer frames than ``states`` or ``steps`` need. Others as ``run_ttc``.
    """
    out = output_folder(config.out)
    sources = {name: _source(name, given) for name, given in config.sources.items()}
    surrogate = open_surrogate(config.checkpoint, config.factory, config.args, device=device_of(config.device))
    name = name_of_model(config.checkpoint, config.factory)
    where: dict[str, Any] = {"count": config.problems, "split": config.split, "reading": config.reading, "checkpoint": name}
    problems, data = read_problems(surrogate, config.data, max(1, config.steps), shown=(), **where)
    sources = sources or {"own": surrogate.stochastic}
    for stochastic in sources.values():
        require_directions_fit(data, stochastic)
    last = problems.truth.shape[1] - 1
    if max(*config.states, config.steps - 1, 0) >= last:
        raise ArgumentError(f"states are {list(config.states)} and steps {config.steps}; the data have {last} steps")
    surrogate.spec = problems.spec
    forms = (False, True) if problems.can_project() else (False,)
    rows: list[Ceiling] = []
    each = len(config.states) * max(config.factors) + len(forms) * config.steps * sum(config.factors)
    with bar(len(sources) * len(problems.truth) * each, "ceiling") as progress, torch.no_grad():
        base = {p: _rolled("deterministic", surrogate, problems, TTCConfig(1, seed=config.seed), p) for p in forms} if config.steps else {}
        for name, stochastic in sources.items():
            found = _one_step(surrogate, problems, stochastic, config, forms, progress)
            for projected in forms:
                for b in config.factors:
                    rollout = None
                    if config.steps:
                        cfg = TTCConfig(b, stochastic=stochastic, seed=config.seed)
                        rollout = _rolled("oracle", surrogate, problems, cfg, projected) / base[False]
                        progress.advance(len(problems.truth) * config.steps * b, note=f"{name}, B = {b}, rollout")
                    rows.append(Ceiling(name, b, projected, *found[projected, b], rollout, base[projected] / base[False] if base else None))
            plain = [dataclasses.asdict(row) for row in rows]
            write_csv(out / "ceiling.csv", plain)
            write_json(out / "ceiling.json", {"rows": plain, "provenance": {**provenance.record(config), **provenance_of(surrogate)}})
    return rows


def _one_step(
    surrogate: Surrogate, problems: Problems, stochastic: StochasticConfig, config: CeilingConfig, forms: tuple[bool, ...], progress: Bar
) -> dict[tuple[bool, int], tuple[float, float, float]]:
    """Return by form and B: ratios of the oracle and the deterministic step to the raw deterministic step, and the share improved."""
    device, most = next((p.device for p in surrogate.parameters()), torch.device("cpu")), max(config.factors)
    errors: dict[bool, list[Tensor]] = {form: [] for form in forms}  # of each [n, B], candidate 0 first
    for step in config.states:
        for i in range(len(problems.truth)):
            x, target = problems.truth[i : i + 1, step].to(device), problems.truth[i, step + 1].to(device)
            window = problems.window(step, surrogate.history)[i : i + 1].to(device)
            ids, number = torch.arange(1, most), torch.tensor([i])
            parts = [surrogate.deterministic(window, step=step, problem_ids=number)]
            parts += [
                surrogate.candidates(window, part, problem_ids=number, seed=config.seed, step=step, stochastic=stochastic)[0]
                for part in ids.split(32)
            ]
            group = torch.cat(parts)
            for projected in forms:
                made = project_conservation(x.expand_as(group), group, _spec_of(problems, i))[0] if projected else group
                scale = 1.0 if problems.scale is None else problems.scale.to(device).reshape(-1, *[1] * problems.spec.ndim)
                error = ((made - target) / scale).square().flatten(1).mean(1).cpu()
                errors[projected].append(torch.where(error.isfinite(), error, torch.inf))
            progress.advance(most)
    reference = torch.stack(errors[False])[:, 0].mean()
    out = {}
    for projected in forms:
        table = torch.stack(errors[projected])
        still = table[:, 0]
        for b in config.factors:
            best = table[:, :b].amin(1)
            out[projected, b] = (
                float(best.mean() / reference),
                float(still.mean() / reference),
                float((best < 0.999 * still).double().mean()),
            )
    return out


def _rolled(name: str, surrogate: Surrogate, problems: Problems, config: TTCConfig, projected: bool) -> float:
    """Return the mean error over the problems at the last step of a rollout."""
    return float(evaluate_method(name, surrogate, problems, None, config, projected=projected).mse[:, -1].mean())


def _spec_of(problems: Problems, i: int) -> Any:
    gamma = problems.spec.gamma
    return problems.spec.replace(gamma=float(gamma[i])) if torch.is_tensor(gamma) and gamma.ndim else problems.spec


def _source(name: str, given: Any) -> StochasticConfig:
    try:
        return StochasticConfig.of(given)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"sources.{name}: {error}") from error


def print_ceiling(rows: list[Ceiling]) -> None:
    """Print the rows as a table."""
    width = max(len(row.source) for row in rows)
    print("Squared error over that of the deterministic step without projection (1.000); the oracle chooses the best of B.")
    print(f"{'source':<{width}}  {'B':>3}  projected  one step (deterministic)  improved  rollout (deterministic)")
    for r in rows:
        rollout = "" if r.rollout is None else f"{r.rollout:.3f} ({r.deterministic_rollout:.3f})"
        print(
            f"{r.source:<{width}}  {r.branching_factor:>3}  {'yes' if r.projected else 'no':<9}  {r.one_step:>8.3f} "
            f"({r.deterministic_one_step:.3f}){'':<8}  {r.improved:>7.0%}  {rollout}"
        )
