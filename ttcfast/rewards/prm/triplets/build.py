"""Makes triplets: K candidates for each state of the reward split, ranked by their distance to the truth."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ttcfast.checks import one_of, whole
from ttcfast.core.base_fm import Surrogate
from ttcfast.core.context import window_at
from ttcfast.core.normalizer import Normalizer
from ttcfast.data import TrajectorySet
from ttcfast.models.checkpoint import surrogate_hash
from ttcfast.runtime import provenance
from ttcfast.runtime.errors import ArgumentError, DataError
from ttcfast.runtime.files import output_folder
from ttcfast.runtime.locks import run_lock
from ttcfast.runtime.progress import bar
from ttcfast.runtime.units import time_step_of
from ttcfast.spec import StochasticConfig

from .file import FILE_NAME, SUFFIXES, TripletHeader
from .writer import TripletWriter, require_same

logger = logging.getLogger(__name__)

Units = Literal["normalized", "physical"]
MEMORY_BUDGET = 4 << 20  # 64 candidates of four channels on 64x64 cells; the surrogate's activations come on top
MOST_TRAJECTORIES = 8


@dataclass(frozen=True)
class TripletConfig:
    """Settings of ``build_triplets``.

    Args:
        K: Candidates per state, at least 3; number 0 is the deterministic step.
        T_prm: States per trajectory, at t = 0 to T_prm - 1.
        seed: Seed of the candidates.
        on_policy: Whether to add the states that the surrogate's own deterministic rollout reaches at t = 1 to T_prm - 1.
        units: Whether errors are mean squares in the surrogate's normalised units or in physical ones.
        memory_budget: Bytes of candidates held at once.

    Raises:
        ValueError: A value is out of range.
    """

    K: int = 100
    T_prm: int = 4
    seed: int = 0
    on_policy: bool = False
    units: Units = "normalized"
    memory_budget: int = MEMORY_BUDGET

    def __post_init__(self) -> None:
        whole("K", self.K, 1)
        if self.K < 3:
            raise ValueError(f"K is {self.K}; best, median and worst need at least 3 candidates")
        for name, least in (("T_prm", 1), ("seed", 0), ("memory_budget", 1)):
            whole(name, getattr(self, name), least)
        one_of("units", self.units, ("normalized", "physical"))

    @property
    def states(self) -> list[tuple[int, bool]]:
        """States of one trajectory in file order, as (step, whether it is from the surrogate's own rollout)."""
        own = [(t, True) for t in range(1, self.T_prm)] if self.on_policy else []  # at t = 0 both are the initial condition
        return [(t, False) for t in range(self.T_prm)] + own


def build_triplets(
    surrogate: Surrogate,
    trajectories: TrajectorySet | Tensor,
    out: str | os.PathLike[str],
    *,
    K: int = 100,
    T_prm: int = 4,
    seed: int = 0,
    on_policy: bool = False,
    units: Units = "normalized",
    stochastic: StochasticConfig | Mapping[str, Any] | None = None,
    memory_budget: int = MEMORY_BUDGET,
    source: str | None = None,
) -> Path:
    """Writes the triplets of ``trajectories`` into one file (see ``ttcfast.rewards.prm.triplets.file``).

    Candidate 0 is the deterministic step and candidate k is ``surrogate.candidates(state, [k], problem_ids=[trajectory], seed=seed,
    step=t)``. Of the finite candidates in ascending order of error, the first is the best, number ``finite // 2`` the median and the last
    the worst, as in the plan. Candidates are made twice, once for their errors in chunks of ``memory_budget``, and the three stored ones
    again from their keys, so that memory does not grow with K. An interrupted run resumes at the first missing trajectory and ends with
    the same file; a finished file with the same settings is kept.

    Args:
        surrogate: The model, on the device to run on. If it sees h frames, the state at t = 0 is frame h - 1 of a trajectory.
        trajectories: A set in the surrogate's channels, or ``[N, T+1, C, *S]`` in physical units. They must not be those of its training,
            on which its errors are smaller and of another kind.
        out: File (``*.hdf5``, ``*.h5``), or folder for ``triplets.hdf5``. Provenance is written next to it.
        K, T_prm, seed, on_policy, units, memory_budget: See ``TripletConfig``.
        stochastic: Noise that makes the candidates differ; None means the surrogate's own.
        source: Origin of the trajectories, stored in the file.

    Returns:
        Path of the file.

    Raises:
        ValueError: An argument is out of range, or normalised units lack a normalizer.
        DataError: Trajectories have fewer than T_prm + h frames or other channels, or ``out`` holds triplets with other settings.
        OutputError: The file cannot be written.

    Source: TTC plan, "Process Reward Model (PRM)"; docs/design/decisions.md ("Triplets").
    """
    config = TripletConfig(K, T_prm, seed, on_policy, units, memory_budget)
    noise = surrogate.stochastic if stochastic is None else StochasticConfig.of(stochastic)
    if units == "normalized" and surrogate.normalizer is None:
        raise ValueError("units is 'normalized' and the surrogate has no normalizer; use units='physical'")
    path, shape = _place(out), _checked(trajectories, surrogate, T_prm)
    header = _header(surrogate, trajectories, config, noise, source)
    count = len(trajectories) * len(config.states)
    with run_lock(path, file=True):
        if path.exists():
            require_same(path, header, count, shape)
            logger.info("%s is there already, made with the same settings", path)
        else:
            _write(path, trajectories, _Maker(surrogate, config, noise), header, count, shape)
    return path


def _write(
    path: Path, trajectories: TrajectorySet | Tensor, maker: _Maker, header: TripletHeader, count: int, shape: tuple[int, ...]
) -> None:
    config = maker.config
    writer = TripletWriter(path.with_name(path.name + ".partial"), header, count, shape)
    try:
        with bar(count, "build_prm_data") as progress:
            progress.advance(writer.done)
            at_once, frames = maker.trajectories_at_once(shape), config.T_prm + maker.surrogate.history
            for first, block in _blocks(trajectories, writer.done // len(config.states), at_once, frames):
                rows = maker.rows(block, first)
                writer.append(**rows)
                progress.advance(len(rows["errors"]), note=f"trajectory {first + len(block)} of {len(trajectories)}")
        _tell_nonfinite(path, writer)
        writer.complete()
    finally:
        writer.close()
    os.replace(writer.path, path)
    provenance.write(path.parent, {**dict(header.config), "out": str(path)}, f"{path.stem}.provenance.json")


def _tell_nonfinite(path: Path, writer: TripletWriter) -> None:
    bad, unusable = int((~np.isfinite(writer.read("errors"))).sum()), int((writer.read("picked") < 0).any(1).sum())
    if bad:
        logger.warning(
            "%s: %d candidates are not finite and were skipped; %d of %d states have no triplet and are skipped by readers",
            *(path, bad, unusable, writer.done),
        )


class _Maker:
    """Makes the candidates, errors and picks of blocks of trajectories."""

    def __init__(self, surrogate: Surrogate, config: TripletConfig, noise: StochasticConfig) -> None:
        self.surrogate, self.config, self.noise = surrogate, config, noise
        self.device = next((p.device for p in surrogate.parameters()), torch.device("cpu"))

    def trajectories_at_once(self, shape: Sequence[int]) -> int:
        """So many that a chunk holds all candidates of each, but few, since a killed run loses what it has of them; one, in several chunks,
        where the budget is smaller."""
        return min(MOST_TRAJECTORIES, max(1, self._states_in_budget(shape) // self.config.K))

    def rows(self, truth: Tensor, first: int) -> dict[str, np.ndarray]:
        """The samples of trajectories ``first``, ``first + 1``, ... (``truth [n, T_prm + h, C, *S]``), trajectory by trajectory."""
        truth, h = truth.to(self.device), self.surrogate.history
        own, parts = truth[:, :h], []
        numbers = torch.arange(first, first + len(truth))
        for step in range(self.config.T_prm - 1) if self.config.on_policy else ():
            after = self.surrogate.deterministic(window_at(own, step, h), step=step, problem_ids=numbers)
            own = torch.cat([own, after.unsqueeze(1)], 1)
        for step, is_own in self.config.states:
            made = self._samples(window_at(own if is_own else truth, step, h), truth[:, step + h], numbers, step)
            parts.append({**made, "on_policy": torch.full((len(truth),), is_own)})
        return {name: torch.stack([p[name] for p in parts], 1).flatten(0, 1).cpu().numpy() for name in parts[0]}

    def _samples(self, window: Tensor, target: Tensor, numbers: Tensor, step: int) -> dict[str, Tensor]:
        still = self.surrogate.deterministic(window, step=step, problem_ids=numbers)
        # One tensor for all: small tensors kept between the freed candidates would fragment the allocator's memory.
        errors = torch.empty(len(window), self.config.K, dtype=torch.float32, device=still.device)
        errors[:, :1] = self._error(still.unsqueeze(1), target)
        at_once = max(1, self._states_in_budget(target.shape[1:]) // len(window))
        for first in range(1, self.config.K, at_once):
            ids = torch.arange(first, min(first + at_once, self.config.K))
            errors[:, first : first + len(ids)] = self._error(self._candidates(window, ids, numbers, step), target)
        found = errors.cpu()
        picked = torch.stack([pick(row) for row in found])
        state = window if self.surrogate.history == 1 else window[:, -1]
        frames = torch.stack([state, *self._again(window, still, picked, numbers, step), still, target], 1)
        return {
            "frames": frames.float(),
            "errors": found,
            "picked": picked,
            "step": torch.full((len(window),), step),
            "trajectory": numbers,
        }

    def _again(self, window: Tensor, still: Tensor, picked: Tensor, numbers: Tensor, step: int) -> list[Tensor]:
        """Best, median and worst, ``[n, C, *S]`` each, made again; NaN where there is no triplet."""
        out = still.unsqueeze(1).expand(-1, 3, *still.shape[1:]).clone()
        for row, ids in enumerate(picked):
            if bool((ids < 0).any()):
                out[row] = torch.nan
                continue
            made = self._candidates(window[row : row + 1], ids, numbers[row : row + 1], step)[0]
            out[row] = torch.where((ids > 0).to(self.device).reshape(-1, *[1] * (made.ndim - 1)), made, out[row])
        return list(out.unbind(1))

    def _candidates(self, window: Tensor, ids: Tensor, numbers: Tensor, step: int) -> Tensor:
        return self.surrogate.candidates(window, ids, problem_ids=numbers, seed=self.config.seed, step=step, stochastic=self.noise)

    def _error(self, candidates: Tensor, target: Tensor) -> Tensor:
        """Mean squared error ``[n, b]``; NaN where the candidate is not finite."""
        difference = candidates - target.unsqueeze(1)
        if self.config.units == "normalized":
            assert self.surrogate.normalizer is not None
            difference /= self.surrogate.normalizer.std.to(difference).reshape(-1, *[1] * (difference.ndim - 3))
        difference = self.surrogate.spec.predicted(difference, channel_axis=2)
        return difference.square_().flatten(2).mean(2).float()

    def _states_in_budget(self, shape: Sequence[int]) -> int:
        return int(max(1, self.config.memory_budget // (4 * int(np.prod(shape)))))


def pick(errors: Tensor) -> Tensor:
    """Returns candidate ids ``[3]`` of the best, median and worst of ``errors [K]``, non-finite ones excluded; ties go to the lower id.

    All are -1 if fewer than three candidates are finite or candidate 0 is not: if the deterministic step fails there is nothing to choose.
    """
    finite = int(errors.isfinite().sum())
    if finite < 3 or not bool(errors[0].isfinite()):
        return torch.full((3,), -1)
    order = torch.where(errors.isfinite(), errors, torch.inf).argsort(stable=True)
    return order[[0, finite // 2, finite - 1]]


def _blocks(trajectories: TrajectorySet | Tensor, start: int, at_once: int, frames: int) -> Iterator[tuple[int, Tensor]]:
    """Yields frames ``[n, frames, C, *S]`` of the trajectories from ``start`` on, in blocks aligned to multiples of ``at_once``."""
    while start < len(trajectories):
        stop = min(len(trajectories), (start // at_once + 1) * at_once)
        if isinstance(trajectories, Tensor):
            yield start, trajectories[start:stop, :frames].float()
        else:
            yield start, torch.stack([trajectories.read(i, 0, frames) for i in range(start, stop)])
        start = stop


def _header(
    surrogate: Surrogate, trajectories: TrajectorySet | Tensor, config: TripletConfig, noise: StochasticConfig, source: str | None
) -> TripletHeader:
    spec = surrogate.spec if isinstance(trajectories, Tensor) else trajectories.spec
    channels = spec.num_channels
    said = {k: v for k, v in dataclasses.asdict(config).items() if k != "memory_budget"}
    said |= {
        "stochastic": dataclasses.asdict(noise),
        "source": source,
        "trajectories": len(trajectories),
        "data": _fingerprint(trajectories),
        "time_step": surrogate.time_step if isinstance(trajectories, Tensor) else time_step_of(trajectories.times),
    }
    own = surrogate.normalizer
    normalizer = Normalizer(torch.zeros(channels), torch.ones(channels)) if own is None else own
    return TripletHeader(spec, normalizer, surrogate_hash(surrogate), said)


def _fingerprint(trajectories: TrajectorySet | Tensor) -> str:
    """Hash of all initial conditions, which identifies the trajectories independently of their place."""
    digest = hashlib.sha256()
    for i in range(len(trajectories)):
        first = trajectories[i, :1] if isinstance(trajectories, Tensor) else trajectories.read(i, 0, 1)
        digest.update(first.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _checked(trajectories: TrajectorySet | Tensor, surrogate: Surrogate, steps: int) -> tuple[int, ...]:
    """Checks the trajectories and returns the shape of a state."""
    spec, h = surrogate.spec, surrogate.history
    if isinstance(trajectories, Tensor):
        if trajectories.ndim != spec.ndim + 3 or not len(trajectories):
            raise DataError(f"trajectories have shape {tuple(trajectories.shape)}; expected [N, T+1, C, *S] with {spec.ndim} space axes")
        frames, shape = trajectories.shape[1], tuple(trajectories.shape[2:])
    else:
        frames, shape = len(trajectories.times), (trajectories.spec.num_channels, *trajectories.shape)
    if shape[0] != spec.num_channels:
        raise DataError(f"trajectories have {shape[0]} channels and the surrogate {spec.num_channels}; use TrajectorySet.converted")
    if frames < steps + h:
        least = f"at least {steps + h} for history={h}, or a smaller T_prm"
        raise DataError(f"T_prm is {steps} and the trajectories have {frames} frames; give {least}")
    return shape


def _place(out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    if path.suffix.lower() not in SUFFIXES:
        if path.is_file():
            raise ArgumentError(f"out is {path}, which is a file; give a folder, or the name of an .hdf5 file")
        path = path / FILE_NAME
    output_folder(path.parent)
    return path
