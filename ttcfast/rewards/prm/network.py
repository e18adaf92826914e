"""What both kinds of reward model share: a state and its candidates as features, a first layer that is linear in both, and their files."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttcfast.checks import one_of, whole
from ttcfast.core.normalizer import Normalizer
from ttcfast.models.periodic import GridConv2d, pad_grid
from ttcfast.runtime.units import Units
from ttcfast.spec import StateSpec

from .residual import EulerResidual

Padding = Literal["boundary", "zeros"]


class PairNetwork(nn.Module):
    """A network over pairs of a state and a candidate for its successor, both in physical units.

    Its features are ``encode(state)`` and ``(candidate - state) / delta_std``; without a normaliser the two states as they are, as in the
    sketch; with ``residual`` also what the equations say of the pair. A subclass has ``first_layer`` and writes ``score_group``.

    Args:
        in_ch: channels of state and candidate together, 2C.
        periodic: one flag, or one per axis; None takes those of ``spec``, or True without one.
        padding: ``"boundary"``: convolutions wrap around periodic axes and repeat the edge elsewhere; ``"zeros"``: the sketch's.
        normalizer: of the surrogate whose candidates are scored; None for the sketch's raw states.
        spec: layout of the states; two space dimensions.
        residual: features of ``EulerResidual`` beside the states (needs ``normalizer`` and ``spec``), or its arguments; None: none.
        info: JSON values that ``save_pretrained`` stores with the network: surrogate id, training, validation.

    Raises:
        ValueError: an odd ``in_ch``, a normaliser or a spec of other channels or dimensions.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        in_ch: int,
        *,
        periodic: bool | Sequence[bool] | None,
        padding: Padding,
        normalizer: Normalizer | None,
        spec: StateSpec | None,
        residual: EulerResidual | Mapping[str, Any] | None,
        info: Mapping[str, Any] | None,
    ) -> None:
        super().__init__()
        whole("in_ch", in_ch, 2)
        one_of("padding", padding, ("boundary", "zeros"))
        if in_ch % 2:
            raise ValueError(f"in_ch is {in_ch}; it counts the channels of a state and of its candidate, 2C, so give an even number")
        channels = in_ch // 2
        for name, given in (("normalizer", normalizer), ("spec", spec)):
            if given is not None and given.num_channels != channels:
                raise ValueError(f"{name} has {given.num_channels} channels and in_ch is {in_ch}; it must be twice the channels")
        if spec is not None and spec.ndim != 2:
            raise ValueError(f"spec has {spec.ndim} space dimensions; the reward models are written for 2")
        if periodic is None:
            periodic = True if spec is None else spec.periodic_axes
        self.in_ch, self.channels, self.padding = int(in_ch), channels, padding
        self.periodic = (bool(periodic),) * 2 if isinstance(periodic, bool) else tuple(bool(p) for p in periodic)
        self.normalizer, self.spec, self.info = normalizer, spec, dict(info or {})
        self.residual = EulerResidual.of(residual)
        if self.residual is not None:
            self.residual.check(spec, normalizer)
        extra = (0, 0) if self.residual is None else (self.residual.state_channels, self.residual.candidate_channels)
        self.state_width, self.candidate_width = channels + extra[0], channels + extra[1]

    @property
    def first_layer(self) -> nn.Conv2d:
        """The convolution over the features of state and candidate, in this order."""
        raise NotImplementedError

    def units(self, of: str) -> Units:
        """What it was trained for, as ``require_units`` takes it; gamma counts where features are computed from it."""
        cell = None if self.spec is None else self.spec.cell_volume
        if self.residual is None:
            return Units(of, self.info.get("time_step"), cell)
        assert self.spec is not None  # checked when built
        return Units(of, self.residual.dt, math.prod(self.residual.cell), self.spec.gamma)

    def config(self) -> dict[str, Any]:
        """The sizes that the constructor takes, as JSON; a subclass adds its own."""
        residual = None if self.residual is None else self.residual.to_dict()
        return {"in_ch": self.in_ch, "periodic": list(self.periodic), "padding": self.padding, "residual": residual}

    def forward(self, state: Tensor, cand: Tensor) -> Tensor:
        """Scores ``[B]`` of candidates ``[B, C, X, Y]`` of the states ``[B, C, X, Y]``; higher is better."""
        return self.score_group(state, cand.unsqueeze(1))[:, 0]

    def score_group(self, state: Tensor, candidates: Tensor, share: Tensor | None = None) -> Tensor:
        """Scores ``[N, B]``, float32, of candidates ``[N, B, C, X, Y]`` of the states ``[N, C, X, Y]``.

        The first layer is linear, so the state's part of it is computed once per state and not once per candidate; ``share`` is that part
        where the caller has it already (``state_share``).
        """
        raise NotImplementedError

    def state_share(self, state: Tensor) -> Tensor:
        """The first layer's response ``[N, width, X', Y']`` to the state alone, bias included."""
        weight = self.first_layer.weight[:, : self.state_width]
        return convolve(self.first_layer, self.state_features(state), weight, self.first_layer.bias)

    def state_features(self, state: Tensor) -> Tensor:
        self._check("state", state)
        z = state if self.normalizer is None else self.normalizer.encode(state)
        if self.residual is not None:
            assert self.spec is not None and self.normalizer is not None  # checked when built
            z = torch.cat([z, self.residual.of_state(state, self.spec, self.normalizer, self.periodic)], 1)
        return z.to(self.first_layer.weight.dtype)

    def candidate_features(self, state: Tensor, candidates: Tensor) -> Tensor:
        """``[N, B, candidate_width, X, Y]``."""
        if candidates.ndim != 5 or candidates.shape[0] != state.shape[0] or candidates.shape[2:] != state.shape[1:]:
            raise ValueError(
                f"candidates have shape {tuple(candidates.shape)} and state {tuple(state.shape)}; expected [N, B, C, X, Y] and [N, C, X, Y]"
            )
        features = candidates
        if self.normalizer is not None:
            features = self.normalizer.encode_delta(candidates - state.unsqueeze(1), channel_axis=2)
        if self.residual is not None:
            assert self.spec is not None and self.normalizer is not None
            features = torch.cat([features, self.residual.of_candidates(state, candidates, self.spec, self.normalizer, self.periodic)], 2)
        return features.to(self.first_layer.weight.dtype)

    def first(self, state: Tensor, candidates: Tensor, share: Tensor | None, own: Tensor | None = None) -> Tensor:
        """The first layer's response ``[N * B, width, X', Y']``; ``own``: the candidates' features where the caller has them."""
        self._check("state", state)
        own = self.candidate_features(state, candidates) if own is None else own
        share = self.state_share(state) if share is None else share
        each = convolve(self.first_layer, own.flatten(0, 1), self.first_layer.weight[:, self.state_width :], None)
        return (each.unflatten(0, own.shape[:2]) + share.unsqueeze(1)).flatten(0, 1)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write ``config.json`` (kind, sizes, normaliser, layout, ``info``) and ``model.safetensors`` into ``folder``."""
        from .sketch_files import save_pretrained

        save_pretrained(self, folder)

    @staticmethod
    def from_pretrained(folder: str | os.PathLike[str]) -> PairNetwork:
        """The reward model, of either kind, that ``save_pretrained`` wrote, in evaluation.

        Raises:
            CheckpointError: missing, damaged, or of a kind or sizes that this version does not know.
        """
        from .sketch_files import from_pretrained

        return from_pretrained(folder)

    def _convolution(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
        if self.padding == "zeros":
            return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=(kernel - stride) // 2)
        return GridConv2d(inputs, outputs, kernel, stride=stride, periodic=self.periodic)

    def _check(self, name: str, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; this reward model has in_ch {self.in_ch}, so it takes states "
                f"[N, {self.channels}, X, Y] and candidates of as many channels; give the model that was trained for these states"
            )


def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What ``layer`` would do to ``x`` with another weight and bias."""
    if isinstance(layer, GridConv2d):
        x = pad_grid(x, layer.margin, layer.periodic)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding)


def outside_autocast(x: Tensor) -> torch.autocast:
    """Score heads run in float32: in bfloat16 all scores of a group tied (DECISIONS, Precision)."""
    return torch.autocast(x.device.type, enabled=False)
