"""Layers of the networks of a world model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ttcfast.checks import one_of, whole
from ttcfast.ops import MLP, mlp, norm_mish

SIMNORM_GROUP = 8


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in at least float32, the precision of losses, probabilities and statistics."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def state(x: Tensor) -> Tensor:
    """Return ``x`` as a latent state, in at least float32 under ``torch.autocast``, which rounds the operands of matrix products itself."""
    return wide(x) if x.element_size() < 4 and mixed(x) else x


def mixed(x: Tensor) -> bool:
    """Tell whether ``torch.autocast`` acts on the device of ``x``."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


class SimNorm(nn.Module):
    """Softmax over groups of ``group`` consecutive entries, giving a point on a product of simplices (Hansen et al., TD-MPC2, 2023)."""

    def __init__(self, group: int = SIMNORM_GROUP) -> None:
        super().__init__()
        whole("group", group, 1)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D]``; the group must divide D."""
        return state(x).unflatten(-1, (-1, self.group)).softmax(-1).flatten(-2)


def simplex_distance(z: Tensor, group: int, over: Sequence[int] = ()) -> Tensor:
    """Return the mean over groups of ``|sum - 1|`` plus the magnitude of negative entries, 0 on the product of simplices.

    Args:
        z: Latents, ``[..., D]``.
        group: Entries per simplex; 0 for no simplices, whose distance is 0.
        over: Axes to average over; all by default.
    """
    axes = tuple(axis % z.ndim for axis in over or range(z.ndim))
    if not group:
        return z.new_zeros([size for axis, size in enumerate(z.shape) if axis not in axes])
    groups = z.unflatten(-1, (-1, group))
    return ((groups.sum(-1) - 1).abs() + groups.clamp_max(0).abs().sum(-1)).mean(axes)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight^T`` for one weight ``[O, I]``, or for S weights ``[S, O, I]`` of ``x`` ``[..., S, B, I]``, set by set.

    The sets are multiplied one by one, since a batched product has other bits than theirs.
    """
    if weight.ndim == 2:
        return F.linear(x, weight)
    return torch.stack([F.linear(own, w) for own, w in zip(x.unbind(-3), weight.unbind(0))], -3)


class NormedLinear(nn.Module):
    """Linear, LayerNorm and Mish; bias, LayerNorm and Mish are one fused operation."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        return self.finish(F.linear(x, self.linear.weight))

    def finish(self, product: Tensor, rows: Tensor | None = None) -> Tensor:
        """Apply what follows the product with the weight, to which ``rows`` of the same shape is added."""
        return norm_mish(product, self.linear.bias, self.norm.weight, self.norm.bias, rows=rows, eps=self.norm.eps)


class Network(nn.Module):
    """An MLP with hidden layers of Linear, LayerNorm and Mish.

    Args:
        inputs: Size of the input.
        units: Sizes of the hidden layers, at least one.
        outputs: Size of the output.
        last_layer: ``"linear"``, ``"normed"`` (Linear, LayerNorm, Mish) or ``"simnorm"`` (Linear, LayerNorm, SimNorm).
        last_layer_kwargs: ``group`` of a simnorm (default 8), or ``zero`` of a linear layer (default False): start its weight at 0.

    Raises:
        ValueError: The last layer or a keyword is unknown, there is no hidden layer, or a size is below 1.
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
        one_of("last_layer", last_layer, ("simnorm", "normed", "linear"))
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
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        if isinstance(self.last, NormedLinear) or mixed(x):
            for layer in self.hidden:
                x = layer(x)
            return self.last(x)
        x = mlp(x, self.parts(), eps=self.eps)
        return self.last[2](self.last[1](x)) if isinstance(self.last, nn.Sequential) else x

    @property
    def eps(self) -> float:
        """The number that LayerNorm adds to the variance in hidden layers."""
        return self.hidden[0].norm.eps  # type: ignore[union-attr, return-value]

    def parts(self) -> MLP:
        """Return the parameters of the hidden layers and of the linear layer after them."""
        linear: Any = self.last[0] if isinstance(self.last, nn.Sequential) else self.last
        layers: list[Any] = list(self.hidden)
        linears, norms = [*(layer.linear for layer in layers), linear], [layer.norm for layer in layers]
        return MLP([m.weight for m in linears], [m.bias for m in linears], [m.weight for m in norms], [m.bias for m in norms])


def _initialise(module: nn.Module) -> None:
    """Initialise as TD-MPC2: weights normal with deviation 0.02, cut at two deviations; biases 0."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
        nn.init.zeros_(module.bias)
