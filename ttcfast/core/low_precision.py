"""Copies a model so that its matrix products run in bfloat16 or float16 while everything else keeps its precision."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ttcfast.checks import one_of
from ttcfast.stochastic_sampling.dropout_wrap import edit_output
from ttcfast.stochastic_sampling.sites import Site

DTYPES = (torch.bfloat16, torch.float16)


class LowPrecision:
    """Low-precision copy of a model that follows the model's weights.

    Linear layers, convolutions and attention multiply in ``dtype``. Outputs of linear layers and convolutions are widened at once, so that
    residual sums, norms and activations keep their precision; not before an activation in an ``nn.Sequential`` whose result the next layer
    narrows anyway, nor behind the layers that a module names in its attribute ``low_precision``, because what follows them is narrowed too.
    The weights of these layers are cast once; others are cast by autocast. The last linear layer or convolution, or the modules named by
    the model's attribute ``full_precision`` (a tuple of names), are unchanged, because rounding there would round the result. So are
    depthwise convolutions, which are no matrix products and gain nothing.

    Args:
        model: Copied at first use, and again when its tensors are replaced (another device or dtype). In-place changes of values are
            followed, except those through ``.data``, which leave no trace.
        dtype: One of ``DTYPES``.

    Raises:
        ValueError: The dtype is another, or ``full_precision`` names modules that the model does not have.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        one_of("dtype", dtype, DTYPES)
        self.model, self.dtype = model, dtype
        self._copy: nn.Module | None = None
        self._storage: tuple[Any, ...] = ()
        self._versions: tuple[int, ...] = ()
        kept_modules(model)

    @property
    def current(self) -> nn.Module:
        """The copy, with the model's current weights. Call it within ``products``."""
        storage, versions = storage_of(self.model), versions_of(self.model)
        if self._copy is None or storage != self._storage:
            self._copy = _lowered(self.model, self.dtype)
        elif versions != self._versions:
            with torch.no_grad():
                for own, theirs in zip(_tensors(self.model), _tensors(self._copy)):
                    theirs.copy_(own)
        self._storage, self._versions = storage, versions
        return self._copy

    @contextmanager
    def products(self, device: torch.device) -> Iterator[None]:
        """Enters the autocast context in which the copy must be called."""
        with torch.autocast(device.type, dtype=self.dtype):
            yield

    def sites(self, sites: Sequence[Site]) -> list[Site]:
        """Returns the model's sites of noise with the modules of the copy."""
        low = self.current
        return [site if site.module is None else replace(site, module=low.get_submodule(site.name)) for site in sites]


def storage_of(model: nn.Module) -> tuple[Any, ...]:
    """Identifies the tensors that a model holds; the result changes when tensors are replaced."""
    return tuple((id(t), t.data_ptr(), t.dtype, t.device) for t in _tensors(model))


def versions_of(model: nn.Module) -> tuple[int, ...]:
    """Returns how often each tensor of a model was changed in place; changes through ``.data`` do not count."""
    return tuple(0 if t.is_inference() else t._version for t in _tensors(model))


def hooks_of(model: nn.Module) -> tuple[int, ...]:
    """Returns the number of forward hooks of each module."""
    return tuple(len(m._forward_hooks) for m in model.modules())


def kept_modules(model: nn.Module) -> list[str]:
    """Returns the names of the linear layers and convolutions that stay in full precision.

    Raises:
        ValueError: ``full_precision`` names modules that the model does not have.
    """
    layers = {name: module for name, module in model.named_modules() if _multiplies(module)}
    named, depthwise = list(layers), [name for name, m in layers.items() if isinstance(m, _ConvNd) and 1 < m.in_channels == m.groups]
    asked = getattr(model, "full_precision", None)
    if asked is None:
        return [*named[-1:], *depthwise]
    unknown = [asked] if isinstance(asked, str) else [name for name in asked if name not in named]
    if unknown:
        raise ValueError(
            f"{type(model).__name__}.full_precision is {asked!r}; give a tuple of names of linear layers or convolutions, such as "
            f"{tuple(named[-1:])}, which {unknown} are not"
        )
    return [*asked, *depthwise]


def _lowered(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    low, kept = copy.deepcopy(model).requires_grad_(False), kept_modules(model)
    # nn.MultiheadAttention reads the weights of its linear layer directly; autocast casts those.
    inside = {m for outer in low.modules() if isinstance(outer, nn.MultiheadAttention) for m in outer.modules()}
    stay = {m.get_submodule(name) for m in low.modules() for name in _low_names(m)} | _before_activations(low, kept)
    for name, module in low.named_modules():
        if not _multiplies(module) or module in inside:
            continue
        if name in kept:
            module.register_forward_pre_hook(_autocast_off)
            module.register_forward_hook(_autocast_on)
            continue
        for key, weight in module._parameters.items():
            if weight is not None and weight.is_floating_point():
                module._parameters[key] = nn.Parameter(weight.to(dtype), requires_grad=False)
        module.register_forward_pre_hook(narrow)
        if module not in stay:
            module.register_forward_hook(_Widen(_dtype_of(model)))
    return low


def _low_names(module: nn.Module) -> Sequence[str]:
    """Return the layers that a module names in ``low_precision``.

    Raises:
        ValueError: They are no layers of it.
    """
    asked = getattr(module, "low_precision", ())
    known = [name for name, m in module.named_modules() if _multiplies(m)] if asked else []
    if asked and not (isinstance(asked, (tuple, list)) and set(asked) <= set(known)):
        raise ValueError(
            f"{type(module).__name__}.low_precision is {asked!r}; give a tuple of names of its linear layers or convolutions, of {known}"
        )
    return asked or ()


def _before_activations(model: nn.Module, kept: Sequence[str]) -> set[nn.Module]:
    """Returns the layers whose output another layer in low precision takes from an activation that rounds once, as narrowing would."""
    named = dict(model.named_modules())
    lowered = {m for name, m in named.items() if _multiplies(m) and name not in kept}
    runs = [layers for m in named.values() if type(m) is nn.Sequential for layers in zip(m, list(m)[1:], list(m)[2:])]
    return {a for a, between, b in runs if a in lowered and b in lowered and type(between) in (nn.GELU, nn.ReLU, nn.SiLU)}


def narrow(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Forward pre-hook that casts a layer's inputs to the dtype of its weights; autocast would leave float64 as it is."""
    return _cast(inputs, _dtype_of(module))


class _Widen:
    """Forward hook that casts a layer's output to the model's own dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        return edit_output(output, lambda x: x.to(self.dtype), type(module).__name__)


def _autocast_off(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    torch.set_autocast_enabled(_parameter_of(module).device.type, False)
    return _cast(inputs, _dtype_of(module))


def _autocast_on(module: nn.Module, inputs: Any, output: Any) -> None:
    # Not called after an error; leaving ``products`` restores it then.
    torch.set_autocast_enabled(_parameter_of(module).device.type, True)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return _parameter_of(module).dtype


def _parameter_of(module: nn.Module) -> Tensor:
    return next(t for m in _modules(module) for t in m._parameters.values() if t is not None and t.is_floating_point())


def _cast(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return (t for m in _modules(model) for held in (m._parameters, m._buffers) for t in held.values() if t is not None)


def _modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yields a module and those within it; ``nn.Module.modules`` and what is built on it take a millisecond for a small model."""
    found = {model: None}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        yield module
        new = [m for m in module._modules.values() if m is not None and m not in found]
        found.update(dict.fromkeys(new))
        waiting += reversed(new)  # in the order of nn.Module.modules
