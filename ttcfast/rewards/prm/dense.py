"""The dense reward model: it predicts the error of a candidate at every cell; the score is the negated mean square."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttcfast.checks import whole

from .network import PairNetwork, outside_autocast

_GROWTH = (1.0, 2.0, 3.0, 4.0)  # width of each level relative to the finest


class DensePRM(PairNetwork):
    """Small U-Net that predicts the field ``(truth - candidate) / delta_std`` from a state and a candidate.

    ``error(state [B, C, X, Y], cand [B, C, X, Y])`` returns that field, float32, and ``forward`` minus its mean square ``[B]``. The last
    convolution is initialised to zero, so that an untrained model predicts no error. The network commutes with shifts by ``stride`` cells
    along periodic axes.

    Args:
        in_ch: Channels of state and candidate together, 2C.
        width: Channels of the finest level (coarser ones have two, three and four times as many), or one number per level.
        depth: Residual blocks per level and direction (the coarsest level has one direction), or one number per level.
        levels: Number of resolutions; each halves the cells per axis.
        patch: Stride of the first convolution in cells: 1, or 2 for a network three to four times cheaper, with one convolution at full
            resolution before the last.
        common: ``periodic``, ``padding``, ``normalizer``, ``spec``, ``residual`` and ``info``; see ``PairNetwork``.

    Source: docs/design/decisions.md ("Refinement"), ("Process reward model").
    """

    kind = "dense"

    def __init__(
        self,
        in_ch: int,
        width: int | Sequence[int] = 24,
        depth: int | Sequence[int] = 1,
        *,
        levels: int = 4,
        patch: int = 1,
        **common: Any,
    ) -> None:
        super().__init__(in_ch, **common)
        whole("levels", levels, 1)
        whole("patch", patch, 1)
        self.levels, self.patch = int(levels), int(patch)
        self.width = _per_level("width", width, levels, _GROWTH)
        self.depth = _per_level("depth", depth, levels, (1.0,))
        w = self.width
        inputs = self.state_width + self.candidate_width
        self.stem = self._convolution(inputs, w[0], 3 if patch == 1 else 2 * patch, stride=patch)
        self.down = nn.ModuleList(self._convolution(w[i], w[i + 1], 4, stride=2) for i in range(levels - 1))
        self.up = nn.ModuleList(nn.Conv2d(w[i + 1], 4 * w[i], 1) for i in range(levels - 1))
        self.descend = nn.ModuleList(self._blocks(i) for i in range(levels))
        self.ascend = nn.ModuleList(self._blocks(i) for i in range(levels - 1))
        fine = w[0] if patch == 1 else max(8, w[0] // 2)
        if patch > 1:
            self.unpatch = nn.Conv2d(w[0], fine * patch**2, 1)
            self.mix = self._convolution(fine + inputs, fine, 3)
        self.out = self._convolution(fine, self.channels, 3)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]

    @property
    def first_layer(self) -> nn.Conv2d:
        return self.stem

    @property
    def stride(self) -> int:
        """Cells per axis of one cell of the coarsest level; each grid size must be a multiple of it."""
        return self.patch << (self.levels - 1)

    def config(self) -> dict[str, Any]:
        sizes = {"width": list(self.width), "depth": list(self.depth), "levels": self.levels, "patch": self.patch}
        return {**super().config(), **sizes}

    def error(self, state: Tensor, cand: Tensor) -> Tensor:
        """Returns the predicted ``(truth - cand) / delta_std``, ``[B, C, X, Y]``, float32."""
        return self.error_group(state, cand.unsqueeze(1))[:, 0]

    def error_group(self, state: Tensor, candidates: Tensor, share: Tensor | None = None) -> Tensor:
        """Returns the same for several candidates per state: ``[N, C, X, Y]`` with ``[N, B, C, X, Y]`` -> ``[N, B, C, X, Y]``.

        ``share`` is ``state_share(state)`` if the caller has it already.
        """
        if any(n % self.stride for n in state.shape[2:]):
            raise ValueError(
                f"state has the grid {tuple(state.shape[2:])}; with {self.levels} levels and patch {self.patch} this reward model needs "
                f"multiples of {self.stride}"
            )
        own = self.candidate_features(state, candidates)
        coarse = self._u_net(self.first(state, candidates, share, own))
        if self.patch > 1:
            fine = F.pixel_shuffle(self.unpatch(coarse), self.patch)
            once = self.state_features(state).unsqueeze(1).expand(-1, own.shape[1], -1, -1, -1)
            coarse = self.mix(torch.cat([fine, once.flatten(0, 1).to(fine.dtype), own.flatten(0, 1).to(fine.dtype)], 1))
        h = F.gelu(coarse)
        with outside_autocast(h):
            field: Tensor = self.out(h.to(self.out.weight.dtype)).float()
        return field.view(candidates.shape)

    def score_group(self, state: Tensor, candidates: Tensor, share: Tensor | None = None) -> Tensor:
        return self.score_of(self.error_group(state, candidates, share))

    @staticmethod
    def score_of(field: Tensor) -> Tensor:
        """Returns scores ``[N, B]`` of predicted errors ``[N, B, C, X, Y]``."""
        return -field.square().mean((2, 3, 4))

    def _u_net(self, h: Tensor) -> Tensor:
        skips = []
        for i, blocks in enumerate(self.descend):
            h = blocks(h)
            if i < self.levels - 1:
                skips.append(h)
                h = self.down[i](h)
        for i in reversed(range(self.levels - 1)):
            h = skips[i] + F.pixel_shuffle(self.up[i](h), 2)
            h = self.ascend[i](h)
        return h

    def _blocks(self, level: int) -> nn.Sequential:
        width = self.width[level]
        return nn.Sequential(
            *(_Residual(self._convolution(width, width, 3), self._convolution(width, width, 3)) for _ in range(self.depth[level]))
        )


class _Residual(nn.Module):
    """``x + second(gelu(first(gelu(x))))``; the second starts small, so that deep stacks start near the identity."""

    def __init__(self, first: nn.Conv2d, second: nn.Conv2d) -> None:
        super().__init__()
        self.first, self.second = first, second
        with torch.no_grad():
            second.weight.mul_(0.3)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.second(F.gelu(self.first(F.gelu(x))))
        return x + change


def _per_level(name: str, value: int | Sequence[int], levels: int, growth: Sequence[float]) -> tuple[int, ...]:
    """One number per level; a single number is multiplied by ``growth``, whose last entry applies to all further levels."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = [round(value * growth[min(i, len(growth) - 1)]) for i in range(levels)]
    if not isinstance(value, Sequence) or len(value) != levels:
        raise ValueError(f"{name} is {value!r} for {levels} levels; give one whole number, or one per level")
    for i, number in enumerate(value):
        whole(f"{name}[{i}]", number, 1)
    return tuple(int(n) for n in value)
