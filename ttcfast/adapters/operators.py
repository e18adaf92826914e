"""Models of neuraloperator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .wrappers import Adapter, tensor_of


class _Operator(Adapter):
    latent_module = "lifting"

    def forward(self, x: Any, **given: Any) -> Any:
        return tensor_of(self.call(x, **given))


def neuraloperator(model: nn.Module | str | Path, *, name: str | None = None, **arguments: Any) -> nn.Module:
    """Adapts a model of neuraloperator; ``latent_sigma`` adds noise to what its lifting returns.

    Args:
        model: An FNO, TFNO or other model ``[M, C, *S]`` to ``[M, C, *S]``, a data processor that wraps one (its statistics are for
            ``normalizer``), or the folder of ``model.save_checkpoint(folder, name)``, which needs ``name`` and the class by
            ``arguments["cls"]``.
        name: Name of the checkpoint in the folder.
        arguments: Keyword arguments of every call.

    Raises:
        ValueError: A data processor wraps no model, or a folder comes without a name or class.
    """
    if isinstance(model, (str, Path)):
        kind = arguments.pop("cls", None)
        if name is None or kind is None:
            raise ValueError(f"model is the folder {str(model)!r}; give name= and cls=, such as cls=neuralop.models.FNO")
        loaded: nn.Module = kind.from_checkpoint(str(model), name)
        return _Operator(loaded, arguments)
    if hasattr(model, "in_normalizer") and hasattr(model, "out_normalizer"):
        inner = getattr(model, "model", None)
        if not isinstance(inner, nn.Module):
            raise ValueError(f"{type(model).__name__} wraps no model; call its wrap(model) first, or give the model itself")
        model = inner
    return _Operator(model, arguments)
