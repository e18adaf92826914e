"""The scalar reward model: the seed's convolutional trunk with the padding of the data's boundary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ttcfast.checks import whole
from ttcfast.core.normalizer import Normalizer
from ttcfast.spec import StateSpec

from .network import Padding, PairNetwork, outside_autocast
from .residual import EulerResidual


class PRM(PairNetwork):
    """Convolutions and GELU, the mean over all cells, one number: ``forward(state [B, C, X, Y], cand [B, C, X, Y]) -> [B]``.

    Departs from the sketch in the padding, which is that of the data's boundary (``padding="zeros"`` is the sketch's), and in the
    normaliser, without which the features are the sketch's. Parameters have the sketch's names, so that its state dicts load. The head is
    float32 under autocast.

    Args:
        in_ch, width, depth: the sketch's; ``in_ch`` is 2C.
        Others as ``PairNetwork``.

    Source: seeds/ttc-integration-plan.md section 5; DECISIONS 12.
    """

    kind = "scalar"

    def __init__(
        self,
        in_ch: int,
        width: int = 64,
        depth: int = 6,
        *,
        periodic: bool | Sequence[bool] | None = None,
        padding: Padding = "boundary",
        normalizer: Normalizer | None = None,
        spec: StateSpec | None = None,
        residual: EulerResidual | Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(in_ch, periodic=periodic, padding=padding, normalizer=normalizer, spec=spec, residual=residual, info=info)
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
        return self.scores_of(h).unflatten(0, candidates.shape[:2])

    def scores_of(self, trunk: Tensor) -> Tensor:
        """Scores ``[M]`` of the trunk's output ``[M, width, X, Y]``; the head of the sketch, in float32."""
        linear = self.head[-1]
        assert isinstance(linear, nn.Linear)
        with outside_autocast(trunk):
            return linear(trunk.mean((2, 3), dtype=linear.weight.dtype)).squeeze(-1)
