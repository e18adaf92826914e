"""Models of The Well, with layouts from its metadata."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttcfast.core.base_fm import Surrogate
from ttcfast.core.normalizer import Normalizer
from ttcfast.spec import FieldSpec, StateSpec

from .statistics import normalizer as converted
from .wrappers import Adapter, tensor_of


class _WellModel(Adapter):
    """Calls a model that takes all frames of the variable fields, then the constant fields once."""

    def __init__(self, model: nn.Module, history: int, variable: int, arguments: dict[str, Any]) -> None:
        super().__init__(model, arguments)
        self.history, self.variable = history, variable

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        frames = x.unflatten(1, (self.history, -1))
        constant = frames[:, -1, self.variable :]
        return tensor_of(self.call(torch.cat([frames[:, :, : self.variable].flatten(1, 2), constant], 1), **given))


def well_spec(metadata: Any, **declared: Any) -> FieldSpec:
    """Returns the layout that The Well's metadata describe: fields by tensor order, then constant fields, which are given.

    The domain counts as periodic if all its boundaries are; ``periodic=(True, False)`` says it for each axis. ``declared`` holds other
    arguments of ``StateSpec.fields``, such as ``conserved``, which the metadata do not tell.
    """
    variable = [name for order in sorted(metadata.field_names) for name in metadata.field_names[order]]
    constant = [name for order in sorted(metadata.constant_field_names) for name in metadata.constant_field_names[order]]
    kinds = {str(getattr(kind, "name", kind)).upper() for kind in metadata.boundary_condition_types}
    options: dict[str, Any] = {"ndim": metadata.n_spatial_dims, "periodic": kinds == {"PERIODIC"}, "given": tuple(constant)}
    return StateSpec.fields(*variable, *constant, **{**options, **declared})


def well(
    model: nn.Module,
    metadata: Any,
    *,
    history: int | None = None,
    predicts: Literal["state", "delta"] = "state",
    normalizer: Any = None,
    spec: dict[str, Any] | None = None,
    arguments: dict[str, Any] | None = None,
    **options: Any,
) -> Surrogate:
    """Makes a surrogate of a model of The Well, whose input is the history of the variable fields followed by the constant fields.

    Args:
        model: Maps ``[M, h*C + constant, *S]`` to ``[M, C, *S]``.
        metadata: The ``WellMetadata`` of the data set (``dataset.metadata``).
        history: Number h of frames; None reads it off ``model.dim_in`` or the model's first convolution.
        predicts: ``"delta"`` if the model returns changes in the units of the normaliser's deltas (``mean_delta``, ``std_delta``).
        normalizer: The data set's normaliser (``dataset.norm``), or one of ours.
        spec: Further arguments of ``StateSpec.fields``, such as ``{"conserved": "density"}``.
        arguments: Keyword arguments of every call of the model.
        options: Further arguments of ``Surrogate``.

    Raises:
        ValueError: The model's channels do not fit the metadata.
    """
    layout = well_spec(metadata, **(spec or {}))
    constant = len(layout.given_channels)
    variable = layout.num_channels - constant
    if history is None:
        history = _history(model, variable, constant)
    wrapped = _WellModel(model, history, variable, arguments or {})
    norm: Normalizer | None = None if normalizer is None else converted(normalizer, predicts=predicts)
    return Surrogate(wrapped, layout, normalizer=norm, history=history, predicts=predicts, **options)


def _history(model: nn.Module, variable: int, constant: int) -> int:
    channels = getattr(model, "dim_in", None)
    if channels is None:
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        channels = next((m.in_channels for m in model.modules() if isinstance(m, kinds)), None)
    frames, rest = (0, 1) if channels is None else divmod(int(channels) - constant, variable)
    if rest or frames < 1:
        raise ValueError(
            f"{type(model).__name__} takes {channels} channels, and the metadata have {variable} fields and {constant} constant ones; "
            "give history="
        )
    return frames
