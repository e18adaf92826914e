"""A surrogate and data small enough to evaluate every method in a second: states that move by one cell per step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.data import write_well
from ttcfast.evaluation.evaluate import Problems, evaluate
from ttcfast.models import ViT, ViTConfig, save_surrogate
from ttcfast.models.checkpoint import surrogate_meta
from ttcfast.rewards.common import ARMScorer
from ttcfast.spec import ARMWeights, StateSpec, TTCConfig

SPEC = StateSpec.euler2d(cell_volume=1.0 / 16**2)
SCALE = torch.tensor([0.3, 0.4, 0.4, 0.8])


class ShiftWithError(nn.Module):
    """Moves a normalised state by one cell, adds an error, a bias (so that totals drift) and a noise by dropout."""

    def __init__(self, bias: float = 0.02, noise: float = 0.05, blows_up: bool = False):
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.bias, self.noise, self.blows_up = bias, noise, blows_up

    def forward(self, x: Tensor) -> Tensor:
        moved = torch.roll(x, 1, -2)
        wrong = 0.03 * torch.sin(2.0 * moved) + 0.02 * (torch.roll(moved, 1, -1) - moved)
        out = moved + self.bias + wrong + self.noise * (self.drop(torch.ones_like(moved)) - 1.0)
        return out * torch.where(x.abs().amax((1, 2, 3), keepdim=True) > 3.0, torch.nan, 1.0) if self.blows_up else out


def trajectories(n: int = 5, steps: int = 8, grid: int = 16, seed: int = 0) -> Tensor:
    """Exact solutions ``[n, steps+1, 4, grid, grid]``, density and pressure positive."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linspace(0, 1, grid + 1)[:-1]
    phase, depth = torch.rand(2, n, 4, 1, 1, generator=generator)
    wave = torch.sin(2 * torch.pi * (x[:, None] + 2 * x[None, :] + phase)) * (0.2 + 0.6 * depth)
    first = torch.tensor([1.0, 0.2, -0.1, 2.5])[:, None, None] + SCALE[:, None, None] * wave
    return torch.stack([torch.roll(first, s, -2) for s in range(steps + 1)], 1)


def surrogate(**options: object) -> Surrogate:
    normalizer = Normalizer(torch.tensor([1.0, 0.2, -0.1, 2.5]), SCALE)
    return Surrogate(ShiftWithError(**options), SPEC, normalizer=normalizer)  # type: ignore[arg-type]


def problems(n: int = 5, steps: int = 8, rolled: int | None = None, shown: tuple[int, ...] = (0, 2)) -> Problems:
    return Problems(trajectories(n, steps), SPEC, rolled or steps, SCALE, tuple(i for i in shown if i < n))


def arm() -> ARMScorer:
    return ARMScorer(ARMWeights(), None, spec=SPEC, momentum="components", scale="relative")


def small_evaluation(n: int = 5, steps: int = 8, rolled: int | None = None, branching_factor: int = 4, **options: object):
    given = problems(n, steps, rolled)
    config = TTCConfig(branching_factor=branching_factor, seed=1)
    return evaluate(surrogate(**options), given, {"arm": arm()}, config)


def write_examples(folder: Path, *, steps: int = 8) -> Path:
    """A folder like ``examples/``: two files of four trajectories and one checkpoint, of a barely trained ViT on 16x16 cells."""
    times = [0.05 * t for t in range(steps + 1)]
    for i in range(2):
        about = {"dataset_name": "shift", "boundary": ("periodic", "periodic"), "parameters": {}}
        write_well(folder / f"test_{i}.hdf5", trajectories(4, steps, seed=i), times, SPEC, **about)
    write_surrogate(folder / "surrogate.safetensors")
    return folder


def write_surrogate(path: Path, grid: int = 16) -> Path:
    """A barely trained ViT that takes rho, momentum, E on a periodic square."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(grid=(grid, grid), width=8, depth=1, heads=1, refine=2, dropout=0.3))
    torch.nn.init.normal_(model.out.weight, std=0.3)
    normalizer = Normalizer(torch.tensor([1.0, 0.2, -0.1, 2.5]), SCALE, 0.1 * SCALE)
    save_surrogate(path, model, surrogate_meta(model, normalizer, StateSpec.euler2d(cell_volume=1.0 / grid**2)))
    return path


@contextmanager
def undrawn() -> Iterator[None]:
    """Leave every figure blank, in its file and format: drawing takes ten times as long as a small run, and tests/report holds it."""
    draw = Figure.savefig

    def blank(figure: Figure, target: Any, **options: Any) -> None:
        draw(Figure(figsize=(0.5, 0.5)), target, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", blank)
        yield
