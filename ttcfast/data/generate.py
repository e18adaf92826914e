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
from ttcfast.physics.navier_stokes import LENGTH, VorticitySolver, random_vorticity, spectral_resampling
from ttcfast.physics.solver import can_compile
from ttcfast.runtime.devices import device_of
from ttcfast.runtime.errors import ArgumentError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.progress import bar
from ttcfast.spec import EulerSpec, StateSpec
from ttcfast.states import Symmetry

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


SYSTEMS: dict[str, dict[str, Any]] = {  # settings that are left to the system
    "euler": {"out": "data/euler64", "grid": 64, "factor": 2, "t_end": 1.0, "cfl": 0.7, "per_file": 24, "batch": 8, "default": 1008},
    "kolmogorov": {
        "out": "data/kolmogorov32",
        "grid": 32,
        "factor": 4,
        "t_end": 5.0,
        "cfl": 0.8,
        "per_file": 50,
        "batch": 10,
        "default": 1000,
    },
}


@dataclass(frozen=True)
class KolmogorovFlow:
    """Forced two-dimensional turbulence, as ``VorticitySolver`` takes it, from random vorticity that has developed for ``spin_up``."""

    viscosity: float = 1e-3
    drag: float = 0.1
    wave_number: int = 4
    amplitude: float = 1.0
    spin_up: float = 4.0

    def __post_init__(self) -> None:
        at_least("spin_up", self.spin_up, 0)
        VorticitySolver(viscosity=self.viscosity, drag=self.drag, wave_number=self.wave_number, amplitude=self.amplitude)


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of ``ttcfast generate``. None leaves a setting to the system (``SYSTEMS``).

    Args:
        system: ``"euler"``, a gas on the unit square; or ``"kolmogorov"``, the vorticity of forced Navier-Stokes flow on ``[0, 2 pi]^2``.
        out: Output folder; files are ``out/data/<split>/<preset>_<number>.hdf5``, the statistics of train ``out/stats.yaml``.
        split: One of train, reward, valid, test, or all.
        n: Number of train trajectories over all presets; reward has 12.5 % of it, valid and test have 64 each. With a single split, the
            number in that split; None takes that split's share of the system's default, 1008 or 1000.
        grid: Cells per axis of the stored 2-D data.
        factor: Refinement of the solver's grid per axis. A gas is averaged over blocks of cells, vorticity truncated spectrally.
        frames: Number of stored frames, including the initial one, evenly spaced up to ``t_end``.
        kolmogorov: Parameters of that flow.
        presets: Names in ``ttcfast.physics.initial_conditions``; ``n`` is divided evenly among them. A gas only, as are ``ranges``,
            ``gamma`` and ``boundary``.
        ranges: Arguments of each preset's initial condition; None leaves all to the presets' own defaults, the flows in the appendix of
            Poseidon (Herde et al., 2024). The default is slower flows, close to the statistics of the released CE-RP and CE-CRP sets.
        seed: Random seed of the initial conditions.
        gamma: Ratio of specific heats.
        cfl: CFL number of the solver: dt = cfl / max_cells sum_d (|u_d| + c) / dx_d, or cfl dx / max |u|.
        boundary: ``"periodic"``, ``"outflow"`` or ``"reflecting"``.
        per_file: Trajectories per file; an interrupted run resumes at the first missing file.
        batch: Trajectories solved at once.
        dtype: Precision of the solver, ``"float32"`` or ``"float64"``.
        device: Device of the solver.
        compression: HDF5 filter of the stored fields; None stores them uncompressed.
    """

    system: str = "euler"
    out: str | None = None
    split: str = "all"
    n: int | None = None
    grid: int | None = None
    factor: int | None = None
    frames: int = 21
    t_end: float | None = None
    presets: tuple[str, ...] = ("riemann4", "riemann_curved", "kelvin_helmholtz")
    ranges: Mapping[str, Mapping[str, Any]] | None = field(default_factory=lambda: dict(RANGES))
    seed: int = 0
    gamma: float = 1.4
    cfl: float | None = None
    boundary: str = "periodic"
    per_file: int | None = None
    batch: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    compression: str | None = None
    kolmogorov: KolmogorovFlow = field(default_factory=KolmogorovFlow)

    def __post_init__(self) -> None:
        one_of("system", self.system, tuple(SYSTEMS))
        for name, value in SYSTEMS[self.system].items():
            if name != "default" and getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "presets", tuple(self.presets) if self.system == "euler" else ("kolmogorov",))
        one_of("split", self.split, (*SPLITS, "all"))
        one_of("dtype", self.dtype, ("float32", "float64"))
        for name, least in (("grid", 4), ("factor", 1), ("frames", 2), ("per_file", 1), ("batch", 1), ("seed", 0)):
            at_least(name, getattr(self, name), least)
        if not self.own("t_end") > 0:
            raise ArgumentError(f"t_end is {self.t_end}; give a positive end time")
        if not self.presets:
            raise ArgumentError(f"presets is empty; name at least one of {', '.join(PRESETS)}")
        for preset in self.presets if self.system == "euler" else ():
            one_of("presets", preset, tuple(PRESETS))
        if self.system == "kolmogorov" and (self.own("grid") % 2 or self.own("grid") < 8):
            raise ArgumentError(f"grid is {self.grid}; a spectral solver takes an even number of at least 8 cells")
        if self.system == "kolmogorov" and not self.kolmogorov.wave_number < self.own("grid") / 2:
            least = 2 * self.kolmogorov.wave_number + 2
            raise ArgumentError(
                f"grid is {self.grid} and does not hold kolmogorov.wave_number={self.kolmogorov.wave_number}; give at least {least}"
            )
        for preset, given in (self.ranges or {}).items():
            one_of("ranges", preset, tuple(PRESETS))
            if not isinstance(given, Mapping):
                raise ArgumentError(f"ranges.{preset} is {given!r}; give arguments of the initial condition")
            known = [name for name in inspect.signature(PRESETS[preset]).parameters if name not in ("n", "grid", "seed", "first", "gamma")]
            for name in given:
                one_of(f"ranges.{preset}", name, tuple(known))
        if self.n is not None:
            at_least("n", self.n, len(self.presets))

    def own(self, name: str) -> Any:
        """Return a setting that may have been left to the system."""
        return getattr(self, name)

    def count(self, split: str) -> int:
        """Return the number of trajectories in ``split``, over all presets."""
        train = SYSTEMS[self.system]["default"] if self.n is None or self.split in ("reward", "valid", "test") else self.n
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
    output_folder(config.own("out"))
    jobs = [job for split in (SPLITS if config.split == "all" else (config.split,)) for job in _jobs(config, split)]
    todo = [job for job in jobs if not _done(job)]
    with bar(sum(job.n for job in todo), f"generate {config.split}") as progress:
        for job in todo:
            pieces = []
            for start in range(0, job.n, config.own("batch")):
                pieces.append(_solve(config, job, start, min(config.own("batch"), job.n - start)))
                progress.advance(len(pieces[-1]), note=job.path.name)
            write_well(
                job.path,
                torch.cat(pieces),
                _times(config).tolist(),
                _spec(config),
                dataset_name=f"ttcfast_{job.preset}",
                boundary=(config.boundary if config.system == "euler" else "periodic",) * 2,
                parameters=job.parameters,
                compression=config.compression,
            )
    train = [job.path for job in jobs if job.split == "train"]
    if train:
        write_statistics(train, Path(config.own("out")) / "stats.yaml")
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
    folder = Path(config.own("out")) / "data" / split
    total, jobs = config.count(split), []
    if total > _SPLIT_STRIDE:
        raise ArgumentError(f"n is {total}; a split holds at most {_SPLIT_STRIDE}: use another seed for more")
    for p, preset in enumerate(config.presets):
        n = total // len(config.presets) + (p < total % len(config.presets))
        for number, start in enumerate(range(0, n, config.own("per_file"))):
            first, held = SPLITS.index(split) * _SPLIT_STRIDE + start, min(config.own("per_file"), n - start)
            settings = {"split": split, "preset": preset, "first": first, **_settings(config, preset)}
            jobs.append(_Job(folder / f"{preset}_{number:04d}.hdf5", split, preset, first, held, json.loads(json.dumps(settings))))
    return jobs


def _settings(config: GenerateConfig, preset: str) -> dict[str, object]:
    """What decides the numbers in a file."""
    skipped = {"out", "split", "n", "presets", "device", "compression", "ranges"}
    if config.system == "euler":
        skipped |= {"system", "kolmogorov"}  # files of version 0.1 have neither
        return {k: v for k, v in asdict(config).items() if k not in skipped} | {"ranges": dict((config.ranges or {}).get(preset, {}))}
    return {k: v for k, v in asdict(config).items() if k not in skipped | {"gamma", "boundary"}}


def _done(job: _Job) -> bool:
    if not job.path.exists():
        return False
    found = TrajectoryFile(job.path)
    require_made_with(job.path, {**found.parameters, "trajectories": len(found)}, {**job.parameters, "trajectories": job.n})
    return True


def _solve(config: GenerateConfig, job: _Job, start: int, n: int) -> Tensor:
    """Solve for trajectories ``[n, T, C, *S]`` on the stored grid, float32."""
    side = config.own("grid") * config.own("factor")
    fine = (side, side)
    if config.system == "kolmogorov":
        flow, first = config.kolmogorov, job.first + start
        parameters = {k: v for k, v in asdict(flow).items() if k != "spin_up"}
        rollout = VorticitySolver(**parameters, cfl=config.own("cfl"), dtype=getattr(torch, config.dtype)).rollout
        w0 = random_vorticity(n, side, seed=config.seed, first=first).to(config.device)
        return spectral_resampling(rollout(w0, _times(config) + flow.spin_up), config.own("grid")).float().cpu()
    # A batch of another size would be compiled again, so the last one is padded with problems whose solutions are dropped.
    batch = config.own("batch")
    filled = batch if job.n > batch else n
    u0 = PRESETS[job.preset](
        filled, fine, seed=config.seed, first=job.first + start, gamma=config.gamma, **dict((config.ranges or {}).get(job.preset, {}))
    )
    # Whether to compile depends on the settings alone, or a resumed run would differ in the last digits.
    compiled = side >= 64
    solver = EulerSolver(
        _gas(config), config.boundary, config.own("cfl"), getattr(torch, config.dtype), compile=compiled and can_compile(config.device)
    )
    return block_average(solver.rollout(u0.to(config.device), _times(config)), config.own("factor"))[:n].float().cpu()


def block_average(u: Tensor, factor: int) -> Tensor:
    """Average blocks of ``factor x factor`` cells of ``[..., X, Y]`` in float64, which preserves every integral."""
    x, y = u.shape[-2] // factor, u.shape[-1] // factor
    return u.double().unflatten(-1, (y, factor)).unflatten(-3, (x, factor)).mean((-1, -3)).to(u.dtype)


def _times(config: GenerateConfig) -> Tensor:
    return torch.linspace(0, config.own("t_end"), config.frames, dtype=torch.float64)


def _spec(config: GenerateConfig) -> StateSpec:
    if config.system == "euler":
        return _gas(config)
    cells, waves = config.own("grid"), config.kolmogorov.wave_number
    width = LENGTH / cells
    options: dict[str, Any] = {"conserved": "all", "spacing": (width, width), "cell_volume": width**2, "translations": [0]}
    # cos(waves y) stays under half a turn about the origin, and changes sign, as vorticity does in a mirror, half a wave further
    found = [Symmetry(flips=(True, True), shifts=(0, 1))]
    if waves and cells % (2 * waves) == 0:
        found.append(Symmetry(flips=(True, False), shifts=(0, cells // (2 * waves)), odd=("vorticity",)))
    return StateSpec.fields("vorticity", symmetries=found, **options)


def _gas(config: GenerateConfig) -> EulerSpec:
    volume = 1.0 / config.own("grid") ** 2
    walls = config.boundary == "reflecting"
    return EulerSpec.euler2d(gamma=config.gamma, cell_volume=volume, periodic=config.boundary == "periodic", closed=walls)
