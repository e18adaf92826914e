"""The layers that all networks of a world model are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttcfast.checks import one_of, whole
from ttcfast.ops import norm_mish

LAST_LAYERS = ("simnorm", "normed", "linear")
SIMNORM_GROUP = 8


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: what losses, probabilities and statistics are computed in."""
    return torch.promote_types(dtype, torch.float32)


def wide(x: Tensor) -> Tensor:
    """``x`` in :func:`wide_dtype`."""
    return x.to(wide_dtype(x.dtype))


def state(x: Tensor) -> Tensor:
    """``x`` as a latent state: float32 at least under ``torch.autocast``, which by itself rounds what goes into matrix products."""
    narrow, device = wide_dtype(x.dtype) != x.dtype, x.device.type
    return wide(x) if narrow and torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) else x


class SimNorm(nn.Module):
    """Softmax over groups of ``group`` consecutive entries: a point on a product of simplices (TD-MPC2, arXiv:2310.16828)."""

    def __init__(self, group: int = SIMNORM_GROUP) -> None:
        super().__init__()
        whole("group", group, 1)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """``[..., D]`` -> ``[..., D]``; the group divides D."""
        return state(x).unflatten(-1, (-1, self.group)).softmax(-1).flatten(-2)


class NormedLinear(nn.Module):
    """Linear, LayerNorm, Mish; the last two and the bias are one fused operation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` -> ``[..., outputs]``."""
        return self.finish(F.linear(x, self.linear.weight))

    def finish(self, product: Tensor, rows: Tensor | None = None) -> Tensor:
        """What follows the product of the weight; ``rows``, like it, is added to it."""
        return norm_mish(product, self.linear.bias, self.norm.weight, self.norm.bias, rows=rows, eps=self.norm.eps)


class Network(nn.Module):
    """Hidden layers (Linear, LayerNorm, Mish) and a last one.

    Args:
        inputs: size of the input.
        units: sizes of the hidden layers, at least one.
        outputs: size of the output.
        last_layer: ``"linear"``; ``"normed"``: Linear, LayerNorm, Mish; ``"simnorm"``: Linear, LayerNorm, SimNorm.
        last_layer_kwargs: ``group`` of simnorm (8); ``zero`` of linear (False): its weight begins at 0.

    Raises:
        ValueError: an unknown last layer or keyword, no hidden layer, or a size below 1.
    """

    def __init__(
        self,
        inputs: int,
        units: Sequence[int],
        outputs: int,
        last_layer: str = "linear",
        last_layer_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        given = dict(last_layer_kwargs or {})
        one_of("last_layer", last_layer, LAST_LAYERS)
        if not units:
            raise ValueError("units is empty; give the size of at least one hidden layer")
        for size in (inputs, *units, outputs):
            whole("size of a layer", size, 1)
        self.hidden = nn.ModuleList(NormedLinear(i, o) for i, o in zip((inputs, *units), units))
        self.last: nn.Module
        if last_layer == "normed":
            self.last = NormedLinear(units[-1], outputs)
        elif last_layer == "simnorm":
            self.last = nn.Sequential(nn.Linear(units[-1], outputs), nn.LayerNorm(outputs), SimNorm(given.pop("group", SIMNORM_GROUP)))
        else:
            self.last = nn.Linear(units[-1], outputs)
        zero = given.pop("zero", False) if last_layer == "linear" else False
        if given:
            raise ValueError(f"last_layer_kwargs has {', '.join(map(repr, given))}, which {last_layer!r} does not take")
        self.apply(_initialise)
        if zero:
            nn.init.zeros_(self.last.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., inputs]`` -> ``[..., outputs]``."""
        for layer in self.hidden:
            x = layer(x)
        return self.last(x)


def _initialise(module: nn.Module) -> None:
    """TD-MPC2's: weights from a normal of deviation 0.02 cut at two deviations, biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(module.bias)


def count_parameters(module: nn.Module) -> int:
    """Numbers in all parameters of the module."""
    return sum(p.numel() for p in module.parameters())
