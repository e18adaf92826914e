"""Holds what all reward models share: features of (state, candidate), a first layer that is linear in both, saving and loading."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttcfast.checks import one_of, whole
from ttcfast.core.normalizer import Normalizer
from ttcfast.models.periodic import GridConv2d, pad_grid
from ttcfast.runtime import checkpoints
from ttcfast.runtime.errors import CheckpointError
from ttcfast.runtime.files import output_folder, parse_json, strict, write_json
from ttcfast.runtime.units import Units
from ttcfast.spec import StateSpec

from .residual import EulerResidual

logger = logging.getLogger(__name__)

Padding = Literal["boundary", "zeros"]
_STATISTICS = ("mean", "std", "delta_std")  # of a Normalizer


class PairNetwork(nn.Module):
    """Base class of networks over pairs of a state and a candidate next state, both in physical units.

    The features are ``encode(state)`` and ``(candidate - state) / delta_std``; without a normalizer, both states unchanged, as in the plan;
    with ``residual``, also ``EulerResidual`` of the pair. A subclass sets ``kind``, which saved files name, and implements ``first_layer``
    and ``score_group``.

    Args:
        in_ch: Channels of state and candidate together, 2C.
        periodic: One flag, or one per axis; None means those of ``spec``, or True without a spec.
        padding: ``"boundary"`` wraps around periodic axes and repeats the edge elsewhere; ``"zeros"`` is the plan's.
        normalizer: Normalizer of the surrogate whose candidates are scored; None for raw states, as in the plan.
        spec: Layout of the states; two space dimensions.
        residual: ``EulerResidual`` features or its arguments (needs ``normalizer`` and ``spec``); None for none.
        info: JSON values that ``save_pretrained`` stores with the network: surrogate hash, training, validation.

    Raises:
        ValueError: ``in_ch`` is odd, or the normalizer or spec has other channels or dimensions.
    """

    kind: ClassVar[str]
    kinds: ClassVar[dict[str, type[PairNetwork]]] = {}
    """Every subclass that sets ``kind``, by that name."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in vars(cls):
            PairNetwork.kinds[cls.kind] = cls

    def __init__(
        self,
        in_ch: int,
        *,
        periodic: bool | Sequence[bool] | None = None,
        padding: Padding = "boundary",
        normalizer: Normalizer | None = None,
        spec: StateSpec | None = None,
        residual: EulerResidual | Mapping[str, Any] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        whole("in_ch", in_ch, 2)
        one_of("padding", padding, ("boundary", "zeros"))
        if in_ch % 2:
            raise ValueError(f"in_ch is {in_ch}; it counts the channels of a state and a candidate, 2C; give an even number")
        channels = in_ch // 2
        for name, given in (("normalizer", normalizer), ("spec", spec)):
            if given is not None and given.num_channels != channels:
                raise ValueError(f"{name} has {given.num_channels} channels and in_ch is {in_ch}; in_ch must be twice the channels")
        if spec is not None and spec.ndim != 2:
            raise ValueError(f"spec has {spec.ndim} space dimensions; reward models support 2")
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
        """Convolution over the features of the state followed by those of the candidate."""
        raise NotImplementedError

    def units(self, of: str) -> Units:
        """Returns the time step and cell that it was trained for, for ``require_units``; gamma only if its features depend on it."""
        cell = None if self.spec is None else self.spec.cell_volume
        if self.residual is None:
            return Units(of, self.info.get("time_step"), cell)
        assert self.spec is not None  # checked when built
        return Units(of, self.residual.dt, math.prod(self.residual.cell), self.spec.gamma)

    def config(self) -> dict[str, Any]:
        """Returns the sizes that the constructor takes, as JSON values; a subclass adds its own."""
        residual = None if self.residual is None else dataclasses.asdict(self.residual)
        return {"in_ch": self.in_ch, "periodic": list(self.periodic), "padding": self.padding, "residual": residual}

    def forward(self, state: Tensor, cand: Tensor) -> Tensor:
        """Returns scores ``[B]`` of candidates ``[B, C, X, Y]`` for states ``[B, C, X, Y]``; higher is better."""
        return self.score_group(state, cand.unsqueeze(1))[:, 0]

    def score_group(self, state: Tensor, candidates: Tensor, share: Tensor | None = None) -> Tensor:
        """Returns scores ``[N, B]``, float32, of candidates ``[N, B, C, X, Y]`` for states ``[N, C, X, Y]``.

        The first layer is linear, so that the state's part of it is computed once per state, not once per candidate; ``share`` is that part
        (``state_share``) if the caller has it already.
        """
        raise NotImplementedError

    def state_share(self, state: Tensor) -> Tensor:
        """Returns the first layer's response ``[N, width, X', Y']`` to the state alone, including the bias."""
        weight = self.first_layer.weight[:, : self.state_width]
        return convolve(self.first_layer, self.state_features(state), weight, self.first_layer.bias)

    def state_features(self, state: Tensor) -> Tensor:
        """Returns features ``[N, state_width, X, Y]`` of states ``[N, C, X, Y]``."""
        self._check("state", state)
        z = state if self.normalizer is None else self.normalizer.encode(state)
        if self.residual is not None:
            assert self.spec is not None and self.normalizer is not None  # checked when built
            z = torch.cat([z, self.residual.of_state(state, self.spec, self.normalizer, self.periodic)], 1)
        return z.to(self.first_layer.weight.dtype)

    def candidate_features(self, state: Tensor, candidates: Tensor) -> Tensor:
        """Returns features ``[N, B, candidate_width, X, Y]`` of candidates ``[N, B, C, X, Y]``."""
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
        """Returns the first layer's response ``[N * B, width, X', Y']``; ``own`` are the candidates' features if already computed."""
        self._check("state", state)
        own = self.candidate_features(state, candidates) if own is None else own
        share = self.state_share(state) if share is None else share
        each = convolve(self.first_layer, own.flatten(0, 1), self.first_layer.weight[:, self.state_width :], None)
        return (each.view(*own.shape[:2], *each.shape[1:]) + share.unsqueeze(1)).flatten(0, 1)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` (kind, sizes, normalizer, layout, ``info``) and ``model.safetensors`` into ``folder``.

        Raises:
            OutputError: The folder cannot be written.
        """
        place, norm = output_folder(folder), self.normalizer
        tensors = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("normalizer.")}
        config = {
            "kind": self.kind,
            **self.config(),
            "normalizer": None if norm is None else {name: getattr(norm, name).tolist() for name in _STATISTICS},
            "spec": None if self.spec is None else strict(self.spec.to_meta()),
            "info": self.info,
        }
        checkpoints.save(place / "model.safetensors", tensors, {**self._identity(), "config": strict(config)})
        write_json(place / "config.json", config)

    @staticmethod
    def from_pretrained(folder: str | os.PathLike[str]) -> PairNetwork:
        """Loads the reward model, of any kind, that ``save_pretrained`` wrote, in evaluation mode.

        Raises:
            CheckpointError: Files are missing or damaged, or describe a kind or sizes that this version does not know.
        """
        place = Path(folder)
        if not (place / "config.json").is_file():
            raise CheckpointError(f"reward model {place} has no config.json; give a folder that save_pretrained or ttcfast train_prm wrote")
        try:
            config = parse_json((place / "config.json").read_text(encoding="utf-8"))
            network = _built(config)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"reward model {place}: this version cannot build what config.json describes ({error})") from error
        tensors, meta = checkpoints.load(place / "model.safetensors", network._identity())
        _require_same_config(place, config, meta.get("config"))
        if network.normalizer is not None:
            tensors |= {f"normalizer.{name}": getattr(network.normalizer, name) for name in _STATISTICS}
        checkpoints.load_weights(network, tensors, place / "model.safetensors")
        return network.eval()

    def _identity(self) -> dict[str, Any]:
        """What the header of ``model.safetensors`` must say."""
        return {"architecture": "prm", "kind": self.kind, **self.config()}

    def _convolution(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
        if self.padding == "zeros":
            return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=(kernel - stride) // 2)
        return GridConv2d(inputs, outputs, kernel, stride=stride, periodic=self.periodic)

    def _check(self, name: str, x: Tensor) -> None:
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; this reward model has in_ch {self.in_ch}, so it takes states "
                f"[N, {self.channels}, X, Y] and candidates with as many channels; give the model that was trained for these states"
            )


def _built(config: dict[str, Any]) -> PairNetwork:
    """The untrained network that a ``config.json`` describes."""
    sizes = dict(config)
    kind, norm, spec, info = (sizes.pop(name) for name in ("kind", "normalizer", "spec", "info"))
    if kind not in PairNetwork.kinds:
        raise ValueError(f"kind is {kind!r}; this version knows {', '.join(PairNetwork.kinds)}")
    spec = None if spec is None else StateSpec.from_meta(spec)
    normalizer = None if norm is None else Normalizer(**{name: torch.tensor(norm[name]) for name in _STATISTICS})
    return PairNetwork.kinds[kind](**sizes, normalizer=normalizer, spec=spec, info=info)


def _require_same_config(place: Path, config: dict[str, Any], written: dict[str, Any] | None) -> None:
    """Raises ``CheckpointError`` unless ``config.json`` equals the copy that the weights' file holds under its checksum."""
    if written is None:
        logger.info("%s was written by an older ttcfast, whose config.json has no checksum: flipped bits in it go unnoticed", place)
    elif other := [name for name in {**config, **written} if config.get(name) != written.get(name)]:
        raise CheckpointError(
            f"reward model {place}: config.json is not the one that model.safetensors was written with (other {', '.join(other)}): it is "
            "damaged or was edited, or a run was killed between the two; copy both again, or rerun the command that writes them"
        )


def convolve(layer: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Applies ``layer`` to ``x`` with another weight and bias."""
    if isinstance(layer, GridConv2d):
        x = pad_grid(x, layer.margin, layer.periodic)
    return F.conv2d(x, weight, bias, layer.stride, layer.padding)


def outside_autocast(x: Tensor) -> torch.autocast:
    """Returns a context in which score heads run in float32: in bfloat16 all scores of a group tie.

    Source: docs/design/decisions.md ("Precision").
    """
    return torch.autocast(x.device.type, enabled=False)
