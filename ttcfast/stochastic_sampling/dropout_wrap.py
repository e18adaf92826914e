"""MC dropout: dropout that stays on in evaluation, with everything else of the model (BatchNorm above all) left in evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    """Turn dropout on for good, the rest of the model staying as it is; ``mc_dropout`` does it for the length of a block.

    Recognised: every dropout of torch.nn (Dropout, 1d to 3d, Alpha, FeatureAlpha), and the DropPath, StochasticDepth and DropBlock
    modules of timm, transformers and torchvision, by class name or by a ``drop_prob`` on a module without parameters, and the dropout
    of attention weights inside nn.MultiheadAttention. Only these are switched; ``model.train()`` is never called, so BatchNorm keeps
    its running statistics. Departs from the sketch in that it can set rates and inject dropout, and in that a call without effect
    raises (DECISIONS 8). For a model with nn.MultiheadAttention, torch's fused path for transformer layers, which drops nothing, is
    switched off, for the whole process.

    Args:
        model: any module; changed in place.
        p: rate to set on every dropout, drop-path and attention module, and on injected dropout; None keeps the rates they have.
        after: names of modules (as in ``model.named_modules()``) behind which dropout of rate ``p`` is injected by a forward hook.
            For models that have no dropout, or an ``nn.Identity`` where their rate was 0; such placeholders are left as they are.

    Returns:
        The same model.

    Raises:
        ValueError: ``p`` outside [0, 1), an unknown name in ``after``, ``after`` without ``p``, or a model in which no dropout of a
            rate above 0 is left to act, so that its candidates would all be the same.

    Source: seeds/ttc-integration-plan.md section 3A.
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
    """``enable_mc_dropout`` for the length of a block; flags, rates, hooks and torch's fused path are restored exactly, on exceptions too.

    Having nothing to switch is no error here: the candidates may differ by other noise. Whether they do is the caller's check
    (``require_distinct``). Threads take turns at such blocks and at calls of surrogates (``ttcfast.runtime.turns``).
    """
    with turn("mc_dropout") as this:
        saved = [_Saved.of(m) for m in dropout_modules(model)]
        injected = [(h, h.p) for h in _hooks(model)]
        removers: list[Callable[[], None]] = []
        fused = torch.backends.mha.get_fastpath_enabled()
        try:
            if has_attention(model):
                torch.backends.mha.set_fastpath_enabled(False)
            _switch_on(model, p, after, removers)
            with this.body():
                yield model
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)
            for remove in removers:
                remove()
            for state in saved:
                state.restore()
            for hook, rate in injected:
                hook.p = rate


@contextmanager
def switched_on(module: nn.Module, rate: float) -> Iterator[None]:
    """One dropout module in training at ``rate`` for the length of a block, which no interrupt ends."""
    with turn("dropout"):
        saved = _Saved.of(module)
        try:
            module.training = True
            setattr(module, _rate_name(module) or "", rate)
            yield
        finally:
            saved.restore()


@contextmanager
def eval_mode(model: nn.Module, *, quiet: bool = False, modules: Sequence[nn.Module] | None = None) -> Iterator[nn.Module]:
    """The model in evaluation for the length of a block within a ``turn``; ``quiet`` also silences injected dropout. Restored exactly.

    ``modules`` are those of the model where the caller has listed them already.
    """
    modules = list(model.modules()) if modules is None else modules
    training = [m for m in modules if m.training]
    hooks = [(h, h.p) for m in modules if m._forward_hooks and (h := injected_dropout(m)) is not None] if quiet else []
    try:
        for m in training:
            m.training = False
        for hook, _ in hooks:
            hook.p = 0.0
        yield model
    finally:
        for m in training:
            m.training = True
        for hook, rate in hooks:
            hook.p = rate


def learns_when_called(module: nn.Module) -> bool:
    """Whether a call in training changes the module's buffers: normalisation by running statistics, spectral normalisation."""
    spectral = any(isinstance(hook, SpectralNorm) for hook in module._forward_pre_hooks.values())
    return spectral or isinstance(module, (_NormBase, _SpectralNorm))


def dropout_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The dropout, drop-path and attention modules of a model, each once."""
    return (m for m in model.modules() if is_dropout(m))


def is_dropout(module: nn.Module) -> bool:
    """Whether ``dropout_modules`` counts it."""
    return _rate_name(module) is not None


def active_rates(model: nn.Module) -> list[float]:
    """Rates above 0 of all dropout modules that are switched on and of all injected dropout."""
    rates = [rate_of(m) for m in dropout_modules(model) if m.training] + [h.p for h in _hooks(model)]
    return [r for r in rates if r > 0]


def edit_output(output: Any, edit: Callable[[Tensor], Tensor], where: str) -> Any:
    """``edit`` applied to a module's output: a tensor, or the first entry of a tuple or list."""
    if isinstance(output, Tensor):
        return edit(output)
    if type(output) in (tuple, list) and output and isinstance(output[0], Tensor):
        return type(output)([edit(output[0]), *output[1:]])
    raise ValueError(f"{where} returns a {type(output).__name__}; name a module that returns a tensor, or a tuple that begins with one")


def drop_entries(x: Tensor, p: float) -> Tensor:
    """Inverted dropout from the global streams; of complex entries, which torch's own dropout refuses, both parts together."""
    return x * F.dropout(x.real.new_ones(x.shape), p) if x.is_complex() else F.dropout(x, p)


class InjectedDropout:
    """Forward hook that drops entries of a module's output, in training and evaluation alike; silent at rate 0."""

    def __init__(self, p: float, name: str) -> None:
        self.p, self.name = p, name

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if self.p == 0:
            return output
        return edit_output(output, lambda x: drop_entries(x, self.p), f"module {self.name!r}")


@dataclass
class _Saved:
    """What ``mc_dropout`` changes on a module, to be put back."""

    module: nn.Module
    rate: Any
    training: bool

    @classmethod
    def of(cls, module: nn.Module) -> _Saved:
        return cls(module, getattr(module, _rate_name(module) or ""), module.training)

    def restore(self) -> None:
        setattr(self.module, _rate_name(self.module) or "", self.rate)
        self.module.training = self.training


def check_switch(model: nn.Module, p: float | None, after: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that ``after`` names, by name; ``ValueError`` for arguments that ``enable_mc_dropout`` refuses."""
    if p is not None and not 0 <= p < 1:
        raise ValueError(f"p is {p}; a dropout rate lies in [0, 1)")
    if isinstance(after, str):
        raise ValueError(f"after is the string {after!r}; give a list of module names")
    if after and p is None:
        raise ValueError(f"after names {list(after)} but p is None; injected dropout needs a rate, give p=")
    named = dict(model.named_modules()) if after else {}
    if unknown := [name for name in after if name not in named]:
        raise ValueError(f"after names {unknown}, which {type(model).__name__} does not have; it has {_some(named)}")
    return named


def _switch_on(model: nn.Module, p: float | None, after: Sequence[str], removers: list[Callable[[], None]] | None = None) -> None:
    """Activate, set rates, inject; what removes the hooks that are new is added to ``removers`` one by one."""
    named = check_switch(model, p, after)
    for m in dropout_modules(model):
        m.training = True
        if p is not None:
            setattr(m, _rate_name(m) or "", p)
    for name in after:
        if (remove := _inject(named[name], p or 0.0, name)) is not None and removers is not None:
            removers.append(remove)


def _inject(module: nn.Module, p: float, name: str) -> Callable[[], None] | None:
    if hook := injected_dropout(module):  # a second call sets the rate anew instead of dropping twice
        hook.p = p
        return None
    return module.register_forward_hook(InjectedDropout(p, name)).remove


def injected_dropout(module: nn.Module) -> InjectedDropout | None:
    """The dropout that was injected behind a module, if any; there is at most one."""
    return next((h for h in module._forward_hooks.values() if isinstance(h, InjectedDropout)), None)


def _hooks(model: nn.Module) -> list[InjectedDropout]:
    return [h for m in model.modules() if (h := injected_dropout(m)) is not None]


def has_attention(model: nn.Module) -> bool:
    return any(isinstance(m, nn.MultiheadAttention) for m in model.modules())


def _rate_name(module: nn.Module) -> str | None:
    """The attribute that holds a dropout module's rate, or None if the module is no dropout."""
    family = _family(type(module))  # type: ignore[arg-type]
    if family == "path":
        return next((a for a in ("drop_prob", "p") if hasattr(module, a)), None)
    if family is not None:
        return family
    leaf = not module._modules and all(p is None for p in module._parameters.values())
    return "drop_prob" if leaf and isinstance(getattr(module, "drop_prob", None), (int, float)) else None


@lru_cache(maxsize=4096)
def _family(kind: type) -> str | None:
    """What the class alone says: the attribute with the rate, or that it goes by the name of a drop path."""
    if issubclass(kind, _DropoutNd):
        return "p"
    if issubclass(kind, nn.MultiheadAttention):
        return "dropout"
    return "path" if any(path in kind.__name__.lower() for path in _PATH_NAMES) else None


def rate_of(module: nn.Module) -> float:
    """The rate of a dropout, drop-path or attention module."""
    return float(getattr(module, _rate_name(module) or "") or 0.0)


def _some(named: dict[str, nn.Module], most: int = 12) -> str:
    names = [n for n in named if n]
    return ", ".join(map(repr, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")
