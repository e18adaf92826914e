"""A model that is not ours, of physics that is no gas, and its data: a scalar and a velocity that a constant mask turns off."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.data import write_well
from ttcfast.spec import StateSpec

GRID = 12
SPEC = StateSpec.fields(
    *("tracer", "velocity_x", "velocity_y", "mask"),
    conserved={"tracer": "tracer"},
    bounds={"tracer": (0, None)},
    given="mask",
    spacing=(0.5, 0.5),
    cell_volume=0.25,
)


class Drift(nn.Module):
    """Moves a state by one cell, with an error of its weights, and draws an offset by dropout; reads the mask and does not predict it."""

    def __init__(self, bias: float = 0.02) -> None:
        super().__init__()
        self.drop, self.mix = nn.Dropout(0.2), nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        moved = x[:, :3].roll(1, -2)
        return moved + self.bias + 0.02 * self.mix(x) + 0.1 * (self.drop(torch.ones_like(moved[:, :, :1, :1])) - 1.0)


def make(bias: float = 0.02, normalized: bool = True, conserved: bool = True) -> Surrogate:
    """The factory: ``fm.factory=tests.foreign:make``."""
    spec = SPEC if conserved else StateSpec.fields(*SPEC.names, given="mask")
    normalizer = Normalizer(torch.tensor([2.0, 0, 0, 0.5]), torch.tensor([0.5, 0.7, 0.7, 0.5])) if normalized else None
    return Surrogate(Drift(bias), spec, normalizer=normalizer, stochastic={"dropout_p": 0.4})


class Timed(Drift):
    """Takes the time and makes nothing of it."""

    def forward(self, x: Tensor, *, time: Tensor) -> Tensor:
        assert time.shape == x.shape[:1]
        return super().forward(x)


def conditioned() -> Surrogate:
    normalizer = Normalizer(torch.tensor([2.0, 0, 0, 0.5]), torch.tensor([0.5, 0.7, 0.7, 0.5]))
    return Surrogate(Timed(), SPEC, normalizer=normalizer, inputs=lambda context: {"time": float(context.step)})


def within() -> Surrogate:
    """Of a layout with a bound and no totals."""
    return Surrogate(Drift(), StateSpec.fields(*SPEC.names, given="mask", bounds={"tracer": (1.0, None)}))


class Extrapolate(nn.Module):
    """Continues the line through two frames, with a bias that grows with the step, and draws an offset by dropout; has no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        before, latest = x[:, :3], x[:, 4:7]
        offset = 0.01 * step.view(-1, 1, 1, 1) + 0.1 * (self.drop(torch.ones_like(latest[:, :, :1, :1])) - 1.0)
        return latest + (latest - before) + offset


def make_extrapolate() -> Surrogate:
    """A factory of a model that sees two frames."""
    made = make()
    return Surrogate(Extrapolate(), SPEC, normalizer=made.normalizer, history=2, inputs=lambda context: {"step": float(context.step)})


def not_a_surrogate(width: int = 3) -> nn.Module:
    return nn.Linear(width, width)


def failing() -> Surrogate:
    raise RuntimeError("the weights\nare not there")


def trajectories(n: int = 4, frames: int = 6, seed: int = 0) -> Tensor:
    """States ``[n, frames, 4, 12, 12]`` that move by one cell a frame, the mask apart."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.arange(GRID) * 2 * torch.pi / GRID
    phase = 6 * torch.rand(n, 3, 1, 1, generator=generator)
    first = torch.sin(x[:, None] + 2 * x[None, :] + phase) * torch.tensor([0.7, 1, 1])[:, None, None]
    first[:, 0] += 2
    mask = (torch.rand(n, 1, 1, GRID, GRID, generator=generator) > 0.5).float().expand(n, frames, 1, GRID, GRID)
    return torch.cat([torch.stack([first.roll(t, -2) for t in range(frames)], 1), mask], 2)


def write_data(folder: Path, n: int = 4, spec: StateSpec = SPEC) -> Path:
    """Files of every split in The Well's layout."""
    for seed, split in enumerate(("train", "valid", "reward", "test")):
        about = {"dataset_name": "drift", "parameters": {}, "scalars": {"nu": [0.1 * (i + 1) for i in range(n)]}}
        write_well(folder / "data" / split / "a.hdf5", trajectories(n, seed=seed), [0.5 * t for t in range(6)], spec, **about)
    return folder
