"""MC dropout: dropout that stays on in evaluation, while the rest of the model (BatchNorm above all) stays in evaluation mode."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from ttcfast.runtime.turns import turn

logger = logging.getLogger(__name__)

_PATH_NAMES = ("droppath", "stochasticdepth", "dropblock")  # timm, transformers (Swinv2DropPath, ...), torchvision


def enable_mc_dropout(model: nn.Module, p: float | None = None, after: Sequence[str] = ()) -> nn.Module:
    """Switches dropout on permanently and leaves the rest of the model as it is; ``mc_dropout`` does so within a block.

    It recognises every dropout of torch.nn (Dropout, 1d to 3d, Alpha, FeatureAlpha); the DropPath, StochasticDepth and DropBlock modules
    of timm, transformers and torchvision, by class name or by a ``drop_prob`` on a module without parameters; and the dropout of attention
    weights in nn.MultiheadAttention. It never calls ``model.train()``, so that BatchNorm keeps its running statistics. Departs from the
    plan in that it can set rates and inject dropout, and that a call without effect raises. For a model with nn.MultiheadAttention,
    torch's fused path for transformer layers, which applies no dropout, is disabled for the whole process.

    Args:
        model: Any module; modified in place.
        p: Rate to set on every dropout, drop-path and attention module and on injected dropout; None keeps their rates.
        after: Names of modules (as in ``model.named_modules()``), or patterns such as ``"blocks.*.mlp"``, behind which a forward hook
            injects dropout of rate ``p``, for models that have no dropout, or an ``nn.Identity`` in its place.

    Returns:
        The same model.

    Raises:
        ValueError: ``p`` is outside [0, 1), ``after`` names an unknown module or lacks ``p``, or no dropout has a rate above 0, so that all
            candidates would be equal.

    Source: TTC plan, "Stochasticity at Test Time"; docs/design/decisions.md ("Dropout that acts").
    """
    with turn("enable_mc_dropout"):
        _switch_on(model, p, after)
        if has_attention(model):
            torch.backends.mha.set_fastpath_enabled(False)
    rates = active_rates(model)
    if not rates:
        found = sum(1 for _ in dropout_modules(model))
        raise ValueError(
            f"{type(model).__name__} stays deterministic: it has {found} dropout modules, none with a rate above 0; "
            "set a rate with p=, name modules to drop behind with after=, or use input or latent noise"
        )
    logger.info("MC dropout on %s: %d active sites, rates %s", type(model).__name__, len(rates), sorted(set(rates)))
    return model


@contextmanager
def mc_dropout(model: nn.Module, p: float | None = None, after: Sequence[str] = ()) -> Iterator[nn.Module]:
    """Applies ``enable_mc_dropout`` within a block; flags, rates, hooks and torch's fused path are restored exactly, on exceptions too.

    A model without dropout is no error here, since candidates may differ by other noise; ``require_distinct`` checks whether they do.
    Threads take turns at such blocks and at calls of surrogates (``ttcfast.runtime.turns``).
    """
    with turn("mc_dropout") as this, ExitStack() as stack:
        for module in dropout_modules(model):
            stack.enter_context(_restored(module))
        for hook in _hooks(model):
            stack.callback(setattr, hook, "p", hook.p)
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        if has_attention(model):
            torch.backends.mha.set_fastpath_enabled(False)
        _switch_on(model, p, after, stack)
        with this.body():
            yield model


@contextmanager
def switched_on(module: nn.Module, rate: float) -> Iterator[None]:
    """Holds one dropout module in training mode at ``rate`` within a block that no interrupt ends."""
    with turn("dropout"), _restored(module):
        module.training = True
        _set_rate(module, rate)
        yield


def learns_when_called(module: nn.Module) -> bool:
    """Returns whether a call in training mode updates the module's buffers: running statistics or spectral normalisation."""
    spectral = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    return spectral or isinstance(module, (_NormBase, _SpectralNorm))


def dropout_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Iterates over the dropout, drop-path and attention modules of a model, each once."""
    return (m for m in model.modules() if is_dropout(m))


def is_dropout(module: nn.Module) -> bool:
    """Returns whether a module is a dropout, drop-path or attention module."""
    return _rate_name(module) is not None


def active_rates(model: nn.Module) -> list[float]:
    """Returns the positive rates of all dropout modules in training mode and of all injected dropout."""
    rates = [rate_of(m) for m in dropout_modules(model) if m.training] + [h.p for h in _hooks(model)]
    return [r for r in rates if r > 0]


def edit_output(output: Any, edit: Callable[[Tensor], Tensor], where: str) -> Any:
    """Applies ``edit`` to a module's output: a tensor, the first entry of a tuple or list, or the first tensor of a dict or output object.

    Raises:
        ValueError: The output is anything else.
    """
    if isinstance(output, Tensor):
        return edit(output)
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        return type(output)([edit(output[0]), *output[1:]])
    make: Any = getattr(output, "_make", None)  # of a named tuple
    if make is not None and output and isinstance(output[0], Tensor):
        return make([edit(output[0]), *output[1:]])
    if isinstance(output, MutableMapping):  # also transformers' ModelOutput and diffusers' BaseOutput
        for name, value in output.items():
            if isinstance(value, Tensor):
                edited = copy.copy(output)
                edited[name] = edit(value)
                return edited
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            if isinstance(value := getattr(output, field.name), Tensor):
                return dataclasses.replace(output, **{field.name: edit(value)})  # type: ignore[type-var]
    raise ValueError(f"{where} returns a {type(output).__name__}; name a module that returns a tensor, or an output that begins with one")


def drop_entries(x: Tensor, p: float) -> Tensor:
    """Applies inverted dropout from the global streams; both parts of a complex entry, which torch's dropout refuses, drop together."""
    return x * F.dropout(x.real.new_ones(x.shape), p) if x.is_complex() else F.dropout(x, p)


class InjectedDropout:
    """Forward hook that drops entries of a module's output, in training and evaluation mode alike; inactive at rate 0."""

    def __init__(self, p: float, name: str) -> None:
        self.p, self.name = p, name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if self.p == 0:
            return output
        return edit_output(output, lambda x: drop_entries(x, self.p), f"module {self.name!r}")


@contextmanager
def _restored(module: nn.Module) -> Iterator[None]:
    """Restores rate and mode of a dropout module after the block."""
    rate, training = getattr(module, _rate_name(module) or ""), module.training
    try:
        yield
    finally:
        _set_rate(module, rate)
        module.training = training


def check_switch(model: nn.Module, p: float | None, after: Sequence[str]) -> dict[str, nn.Module]:
    """Returns all modules by name if ``after`` names any; raises ``ValueError`` for arguments that ``enable_mc_dropout`` refuses."""
    if p is not None and not 0 <= p < 1:
        raise ValueError(f"p is {p}; a dropout rate lies in [0, 1)")
    if isinstance(after, str):
        raise ValueError(f"after is the string {after!r}; give a list of module names")
    if after and p is None:
        raise ValueError(f"after names {list(after)} but p is None; injected dropout needs a rate, give p=")
    named = dict(model.named_modules()) if after else {}
    if unknown := [name for name in after if name not in named]:
        near = [name for wanted in unknown for name in difflib.get_close_matches(wanted, [n for n in named if n], 3, 0.4)]
        known = f"near names are {', '.join(map(repr, dict.fromkeys(near)))}" if near else f"it has {_some(named)}"
        raise ValueError(f"after names {unknown}, which {type(model).__name__} does not have; {known}")
    return named


def matching(after: Sequence[str], named: Mapping[str, nn.Module], plain: Mapping[str, str] | None = None) -> list[str]:
    """Expands patterns such as ``"blocks.*.mlp"``, in which a star stands for part of one name between dots, to names of modules.

    Args:
        after: Names or patterns; those without a match are returned as they are.
        named: The modules by name.
        plain: Names within the model inside its wrappers, which match too.
    """
    if isinstance(after, str):  # refused by check_switch
        return after  # type: ignore[return-value]
    found: dict[str, None] = {}
    for wanted in after:
        own = [wanted] if wanted in named else []
        outer = own or [name for name in named if plain and plain.get(name) == wanted][:1]
        pattern = wanted.split(".")
        globbed = outer or [name for name in named if _matches(name, pattern) or (plain and _matches(plain.get(name, ""), pattern))]
        found.update(dict.fromkeys(globbed or [wanted]))
    return list(found)


def _matches(name: str, pattern: Sequence[str]) -> bool:
    parts = name.split(".")
    return len(parts) == len(pattern) and all(map(fnmatchcase, parts, pattern))


def _switch_on(model: nn.Module, p: float | None, after: Sequence[str], stack: ExitStack | None = None) -> None:
    """Activates dropout, sets rates and injects; ``stack`` removes the new hooks."""
    after = matching(after, dict(model.named_modules()))
    named = check_switch(model, p, after)
    for m in dropout_modules(model):
        m.training = True
        if p is not None:
            _set_rate(m, p)
    for name in after:
        if hook := injected_dropout(named[name]):  # a second call changes the rate instead of dropping twice
            hook.p = p or 0.0
            continue
        handle = named[name].register_forward_hook(InjectedDropout(p or 0.0, name))
        if stack is not None:
            stack.enter_context(handle)


def injected_dropout(module: nn.Module) -> InjectedDropout | None:
    """Returns the dropout that was injected behind a module, if any; there is at most one."""
    return next((h for h in module._forward_hooks.values() if isinstance(h, InjectedDropout)), None)


def _hooks(model: nn.Module) -> list[InjectedDropout]:
    return [h for m in model.modules() if (h := injected_dropout(m)) is not None]


def has_attention(model: nn.Module) -> bool:
    """Returns whether the model contains nn.MultiheadAttention."""
    return any(isinstance(m, nn.MultiheadAttention) for m in model.modules())


def _rate_name(module: nn.Module) -> str | None:
    """Returns the attribute that holds a dropout module's rate; None if the module is no dropout."""
    family = _family(type(module))  # type: ignore[arg-type]
    if family == "path":
        return next((a for a in ("drop_prob", "p") if hasattr(module, a)), None)
    if family is not None:
        return family
    leaf = not module._modules and all(p is None for p in module._parameters.values())
    return "drop_prob" if leaf and isinstance(getattr(module, "drop_prob", None), (int, float)) else None


@lru_cache(maxsize=4096)
def _family(kind: type) -> str | None:
    """Returns the attribute with the rate, or ``"path"`` for a drop path, as far as the class alone determines it."""
    if issubclass(kind, _DropoutNd):
        return "p"
    if issubclass(kind, nn.MultiheadAttention):
        return "dropout"
    return "path" if any(path in kind.__name__.lower() for path in _PATH_NAMES) else None


def rate_of(module: nn.Module) -> float:
    """Returns the rate of a dropout, drop-path or attention module."""
    return float(getattr(module, _rate_name(module) or "") or 0.0)


def _set_rate(module: nn.Module, rate: Any) -> None:
    setattr(module, _rate_name(module) or "", rate)


def _some(named: dict[str, nn.Module], most: int = 12) -> str:
    names = [n for n in named if n]
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
