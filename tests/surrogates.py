"""Small models that the tests of the test-time-computing wing roll out: an exactly solvable one, a real one, and failing ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ttcfast.core.base_fm import Surrogate
from ttcfast.models.vit import ViT, ViTConfig
from ttcfast.spec import StateSpec, StochasticConfig


def euler_state(n: int = 3, size: int = 8, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth positive states [n, 4, size, size] in conserved variables."""
    g = torch.Generator().manual_seed(seed)
    u = torch.rand(n, 4, size, size, generator=g, dtype=torch.float64) * 0.2
    u[:, 0] += 1.0
    u[:, 3] += 2.5
    return u.to(dtype)


class Shift(nn.Module):
    """Moves a periodic state by one cell per step: the exact solution after t steps is a roll by t. Keeps every total."""

    def forward(self, x: Tensor) -> Tensor:
        return x.roll(1, -1)


class DropNet(nn.Module):
    """A convolutional net with dropout, and BatchNorm that must stay in evaluation."""

    latent_module = "lift"

    def __init__(self, channels: int = 4, out: int | None = None, p: float = 0.3) -> None:
        super().__init__()
        self.lift = nn.Conv2d(channels, 8, 3, padding=1, padding_mode="circular")
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(p)
        self.head = nn.Conv2d(8, out or channels, 1)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x.shape[0])
        return self.head(self.drop(torch.tanh(self.norm(self.lift(x)))))


def drop_surrogate(*, p: float = 0.3, scale: float = 0.01, history: int = 1, **options: object) -> Surrogate:
    """A stochastic delta surrogate whose steps are small."""
    torch.manual_seed(0)
    model = DropNet(4 * history, 4, p)
    with torch.no_grad():
        model.head.weight.mul_(scale)
        model.head.bias.mul_(scale)
    return Surrogate(model, StateSpec.euler2d(), predicts="delta", history=history, **options)  # type: ignore[arg-type]


def shift_surrogate(input_eps: float = 0.01, **options: object) -> Surrogate:
    """The exact solver with noise on its input: the deterministic candidate is the truth."""
    return Surrogate(Shift(), StateSpec.euler2d(), stochastic=StochasticConfig(dropout=False, input_eps=input_eps), **options)  # type: ignore[arg-type]


def vit_surrogate() -> Surrogate:
    """A small vision transformer with dropout."""
    torch.manual_seed(0)
    model = ViT(ViTConfig(grid=(8, 8), patch=4, width=32, depth=2, heads=2, refine=4, dropout=0.2))
    nn.init.normal_(model.out.weight, std=0.01)
    return Surrogate(model, StateSpec.euler2d(), predicts="delta")


def shifted(x0: Tensor, steps: int) -> Tensor:
    """Truth of ``Shift``: [N, steps+1, C, *S]."""
    return torch.stack([x0.roll(t, -1) for t in range(steps + 1)], 1)


def draw(fm: Surrogate, x: Tensor, ids: Tensor | None = None, **options: object) -> Tensor:
    """Candidates 1 to 4, or those named, of step 1 and seed 3 unless ``options`` name others."""
    return fm.candidates(x, torch.arange(1, 5) if ids is None else ids, **{"seed": 3, "step": 1, **options})  # type: ignore[arg-type]


class Foreign:
    """A model of somebody else: only ``sample_next``, with noise of its own. ``spoil`` may break what it returns."""

    def __init__(self, noise: float = 0.01, spoil: Callable[[Tensor, int], Tensor] | None = None) -> None:
        self.noise, self.spoil, self.calls = noise, spoil, 0
        self.batches: list[int] = []

    def sample_next(self, x_t: Tensor, seed: int | None = None, multi: bool = False) -> Tensor:
        assert multi
        self.calls += 1
        self.batches.append(x_t.shape[0])
        out = x_t.roll(1, -1) + self.noise * torch.randn_like(x_t)
        return out if self.spoil is None else self.spoil(out, self.calls)


class Brittle(nn.Module):
    """``Shift`` that emits NaN where the noise on its input pushed the first cell's density above a limit: bad for some candidates."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        bad = x[:, 0, 0, 0] > self.limit
        return torch.where(bad.reshape(-1, 1, 1, 1), torch.nan, x.roll(1, -1))


def brittle(limit: float = 1.15, input_eps: float = 0.015) -> Surrogate:
    """``Brittle`` with noise on its input."""
    return Surrogate(Brittle(limit), StateSpec.euler2d(), stochastic=StochasticConfig(dropout=False, input_eps=input_eps))
