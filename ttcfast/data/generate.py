"""Generation of data sets: the finite-volume solver on a refined grid, block-averaged, in four splits."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ttcfast.checks import at_least, one_of
from ttcfast.physics import EulerSolver
from ttcfast.physics.initial_conditions import PRESETS
from ttcfast.physics.solver import can_compile
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.progress import bar
from ttcfast.spec import StateSpec

from .alike import require_made_with
from .statistics import write_statistics
from .trajectory_file import TrajectoryFile
from .well_layout import write_well

SPLITS = ("train", "reward", "valid", "test")
# Splits draw from disjoint ranges of the problem index; no split of a run is longer than this.
_SPLIT_STRIDE = 10_000_000
_EVALUATION_COUNT = 64
RANGES: dict[str, dict[str, Any]] = {
    "riemann4": {"density": (0.3, 2.2), "velocity": (-0.45, 0.45), "pressure": (0.05, 0.4)},
    "riemann_curved": {"density": (0.3, 1.1), "velocity": (-0.5, 0.5), "pressure": (0.2, 0.85)},
}


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of ``ttcfast generate``.

    Args:
        out: Output folder; files are ``out/data/<split>/<preset>_<number>.hdf5``, the statistics of train ``out/stats.yaml``.
        split: One of train, reward, valid, test, or all.
        n: Number of train trajectories over all presets; reward has 12.5 % of it, valid and test have 64 each. With a single split, the
            number in that split; None takes that split's share of the default 1008.
        grid: Cells per axis of the stored 2-D data.
        factor: Refinement of the solver's grid per axis.
        frames: Number of stored frames, including the initial one, evenly spaced up to ``t_end``.
        presets: Names in ``ttcfast.physics.initial_conditions``; ``n`` is divided evenly among them.
        ranges: Arguments of each preset's initial condition. The defaults are close to the statistics of the released CE-RP and CE-CRP
            sets, whose flows are slower than those in the appendix of Poseidon (Herde et al., 2024), the presets' own defaults.
        seed: Random seed of the initial conditions.
        gamma: Ratio of specific heats.
        cfl: CFL number of the solver: dt = cfl / max_cells sum_d (|u_d| + c) / dx_d.
        boundary: ``"periodic"``, ``"outflow"`` or ``"reflecting"``.
        per_file: Trajectories per file; an interrupted run resumes at the first missing file.
        batch: Trajectories solved at once.
        dtype: Precision of the solver, ``"float32"`` or ``"float64"``.
        device: Device of the solver.
        compression: HDF5 filter of the stored fields; None stores them uncompressed.
    """

    out: str = "data/euler64"
    split: str = "all"
    n: int | None = None
    grid: int = 64
    factor: int = 2
    frames: int = 21
    t_end: float = 1.0
    presets: tuple[str, ...] = ("riemann4", "riemann_curved", "kelvin_helmholtz")
    ranges: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: dict(RANGES))
    seed: int = 0
    gamma: float = 1.4
    cfl: float = 0.7
    boundary: str = "periodic"
    per_file: int = 24
    batch: int = 8
    dtype: str = "float32"
    device: str = "cpu"
    compression: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "presets", tuple(self.presets))
        one_of("split", self.split, (*SPLITS, "all"))
        one_of("dtype", self.dtype, ("float32", "float64"))
        for name, least in (("grid", 4), ("factor", 1), ("frames", 2), ("per_file", 1), ("batch", 1), ("seed", 0)):
            at_least(name, getattr(self, name), least)
        if not self.t_end > 0:
            raise ArgumentError(f"t_end is {self.t_end}; give a positive end time")
        if not self.presets:
            raise ArgumentError(f"presets is empty; name at least one of {', '.join(PRESETS)}")
        for preset in self.presets:
            one_of("presets", preset, tuple(PRESETS))
        for preset, given in self.ranges.items():
            one_of("ranges", preset, tuple(PRESETS))
            known = [name for name in inspect.signature(PRESETS[preset]).parameters if name not in ("n", "grid", "seed", "first", "gamma")]
            for name in given:
                one_of(f"ranges.{preset}", name, tuple(known))
        if self.n is not None:
            at_least("n", self.n, len(self.presets))

    def count(self, split: str) -> int:
        """Return the number of trajectories in ``split``, over all presets."""
        train = 1008 if self.n is None or self.split in ("reward", "valid", "test") else self.n
        if self.n is not None and self.split == split:
            return self.n
        shares = {"train": train, "reward": max(len(self.presets), round(0.125 * train))}
        return shares.get(split, max(_EVALUATION_COUNT, len(self.presets)))


def generate(config: GenerateConfig) -> list[Path]:
    """Generate the missing files and return the paths of all files, in order.

    An existing file is kept if it was generated with the same settings and refused otherwise, so rerunning an interrupted run resumes it.
    The content of a file depends only on the settings, not on earlier runs (bit for bit on one machine; the last digits may differ
    between processors).

    Raises:
        DataError: An existing file was generated with other settings or is damaged.
        OutputError: The folder cannot be written.
        SolverError: The solver failed on an initial condition.
    """
    device_of(config.device)
    output_folder(config.out)
    jobs = [job for split in (SPLITS if config.split == "all" else (config.split,)) for job in _jobs(config, split)]
    todo = [job for job in jobs if not _done(job)]
    with bar(sum(job.n for job in todo), f"generate {config.split}") as progress:
        for job in todo:
            pieces = []
            for start in range(0, job.n, config.batch):
                pieces.append(_solve(config, job, start, min(config.batch, job.n - start)))
                progress.advance(len(pieces[-1]), note=job.path.name)
            write_well(
                job.path,
                torch.cat(pieces),
                _times(config).tolist(),
                _spec(config),
                dataset_name=f"ttcfast_{job.preset}",
                boundary=(config.boundary,) * 2,
                parameters=job.parameters,
                compression=config.compression,
            )
    train = [job.path for job in jobs if job.split == "train"]
    if train:
        write_statistics(train, Path(config.out) / "stats.yaml")
    return [job.path for job in jobs]


@dataclass(frozen=True)
class _Job:
    path: Path
    split: str
    preset: str
    first: int
    n: int
    parameters: Mapping[str, object]


def _jobs(config: GenerateConfig, split: str) -> list[_Job]:
    folder = Path(config.out) / "data" / split
    total, jobs = config.count(split), []
    if total > _SPLIT_STRIDE:
        raise ArgumentError(f"n is {total}; a split holds at most {_SPLIT_STRIDE}: use another seed for more")
    for p, preset in enumerate(config.presets):
        n = total // len(config.presets) + (p < total % len(config.presets))
        for number, start in enumerate(range(0, n, config.per_file)):
            first, held = SPLITS.index(split) * _SPLIT_STRIDE + start, min(config.per_file, n - start)
            settings = {
                k: v for k, v in asdict(config).items() if k not in ("out", "split", "n", "presets", "device", "compression", "ranges")
            }
            settings |= {"split": split, "preset": preset, "first": first, "ranges": dict(config.ranges.get(preset, {}))}
            jobs.append(_Job(folder / f"{preset}_{number:04d}.hdf5", split, preset, first, held, json.loads(json.dumps(settings))))
    return jobs


def _done(job: _Job) -> bool:
    if not job.path.exists():
        return False
    found = TrajectoryFile(job.path)
    require_made_with(job.path, {**found.parameters, "trajectories": len(found)}, {**job.parameters, "trajectories": job.n})
    return True


def _solve(config: GenerateConfig, job: _Job, start: int, n: int) -> Tensor:
    """Solve for trajectories ``[n, T, C, *S]`` on the stored grid, float32."""
    fine = (config.grid * config.factor,) * 2
    # A batch of another size would be compiled again, so the last one is padded with problems whose solutions are dropped.
    filled = config.batch if job.n > config.batch else n
    u0 = PRESETS[job.preset](
        filled, fine, seed=config.seed, first=job.first + start, gamma=config.gamma, **dict(config.ranges.get(job.preset, {}))
    )
    # Whether to compile depends on the settings alone, or a resumed run would differ in the last digits.
    compiled = config.grid * config.factor >= 64
    solver = EulerSolver(
        _spec(config), config.boundary, config.cfl, getattr(torch, config.dtype), compile=compiled and can_compile(config.device)
    )
    return block_average(solver.rollout(u0.to(config.device), _times(config)), config.factor)[:n].float().cpu()


def block_average(u: Tensor, factor: int) -> Tensor:
    """Average blocks of ``factor x factor`` cells of ``[..., X, Y]`` in float64, which preserves every integral."""
    x, y = u.shape[-2] // factor, u.shape[-1] // factor
    return u.double().unflatten(-1, (y, factor)).unflatten(-3, (x, factor)).mean((-1, -3)).to(u.dtype)


def _times(config: GenerateConfig) -> Tensor:
    return torch.linspace(0, config.t_end, config.frames, dtype=torch.float64)


def _spec(config: GenerateConfig) -> StateSpec:
    return StateSpec.euler2d(
        gamma=config.gamma, cell_volume=1.0 / config.grid**2, periodic=config.boundary == "periodic", closed=config.boundary == "reflecting"
    )
