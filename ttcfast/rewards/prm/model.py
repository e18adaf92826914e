"""The scalar reward model: the plan's convolutional trunk, padded as the data's boundary requires."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.checks import whole

from .network import PairNetwork, outside_autocast


class PRM(PairNetwork):
    """Scores a pair by convolutions, GELU and a mean over all cells: ``forward(state [B, C, X, Y], cand [B, C, X, Y]) -> [B]``.

    Departs from the plan in the padding (``padding="zeros"`` is the plan's) and in the normalizer (None gives the plan's features).
    Parameter names are the plan's, so that its state dicts load. The head runs in float32 under autocast.

    Args:
        in_ch: Channels of state and candidate together, 2C.
        width: Channels of each convolution.
        depth: Number of convolutions.
        common: ``periodic``, ``padding``, ``normalizer``, ``spec``, ``residual`` and ``info``; see ``PairNetwork``.

    Source: TTC plan, "Process Reward Model (PRM)"; docs/design/decisions.md ("Process reward model").
    """

    kind = "scalar"

    def __init__(self, in_ch: int, width: int = 64, depth: int = 6, **common: Any) -> None:
        super().__init__(in_ch, **common)
        whole("width", width, 1)
        whole("depth", depth, 1)
        self.width, self.depth = int(width), int(depth)
        layers: list[nn.Module] = []
        for i in range(depth):
            layers += [self._convolution(self.state_width + self.candidate_width if i == 0 else width, width, 3), nn.GELU()]
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1))

    @property
    def first_layer(self) -> nn.Conv2d:
        layer = self.trunk[0]
        assert isinstance(layer, nn.Conv2d)
        return layer

    def config(self) -> dict[str, Any]:
        return {**super().config(), "width": self.width, "depth": self.depth}

    def forward(self, state: Tensor, cand: Tensor) -> Tensor:
        features = [self.state_features(state), self.candidate_features(state, cand.unsqueeze(1))[:, 0]]
        return self.scores_of(self.trunk(torch.cat(features, 1)))

    def score_group(self, state: Tensor, candidates: Tensor, share: Tensor | None = None) -> Tensor:
        h = self.first(state, candidates, share)
        for layer in list(self.trunk.children())[1:]:
            h = layer(h)
        return self.scores_of(h).view(candidates.shape[:2])

    def scores_of(self, trunk: Tensor) -> Tensor:
        """Returns scores ``[M]`` for outputs of the trunk ``[M, width, X, Y]``: the plan's head, in float32."""
        linear = self.head[-1]
        assert isinstance(linear, nn.Linear)
        with outside_autocast(trunk):
            scores: Tensor = linear(trunk.mean((2, 3), dtype=linear.weight.dtype))
        return scores.squeeze(-1)
